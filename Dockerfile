# The server as an image; docs/deployment.md has the commands.
#   CPU     as it is: PyTorch's wheels without CUDA
#   CUDA    --build-arg TORCH_INDEX= takes PyPI's wheels, which bring CUDA's libraries along
#   model   mounted at /model; or in the image: --target baked --build-arg MODEL=packages/conmamba
ARG PYTHON=3.11-slim
FROM python:${PYTHON} AS server
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
COPY pyproject.toml requirements.txt ./
RUN python -m pip install ${TORCH_INDEX:+--index-url ${TORCH_INDEX}} $(grep ^torch requirements.txt)
RUN python -m pip install ".[serve,audio]"
COPY LICENSE serve.py transcribe.py ./
COPY modules modules
COPY inference inference
RUN useradd --uid 10001 --no-create-home asr
USER 10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready')"]
ENTRYPOINT ["python", "serve.py", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--model", "/model"]

FROM server AS baked
ARG MODEL=model
COPY ${MODEL} /model

FROM server
