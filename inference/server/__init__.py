"""A packaged model behind HTTP: recordings, live audio, a web page. `serve.py` starts it."""

from importlib.util import find_spec

from modules.errors import UserError

PACKAGES = ("fastapi", "uvicorn", "websockets", "python_multipart", "prometheus_client")


def check_installed():
    """UserError that tells how to install what the extra `serve` brings."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(
            f"serving needs {', '.join(missing)}; `pip install '.[serve]'` in this project's folder"
        )
