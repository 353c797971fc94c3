"""One screen about this machine and installation, for users and bug reports.

python -m modules.environment
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from modules.ops import (
    causal_conv1d,
    ctc,
    ctc_prefix,
    depthwise_conv1d,
    gating,
    mamba_step,
    selective_scan,
    state_space_dual,
)

PACKAGES = (
    *("torch", "torchaudio", "speechbrain", "HyperPyYAML", "sentencepiece", "soundfile", "numpy"),
    *("triton", "mamba-ssm", "causal-conv1d", "kenlm", "wandb", "tensorboard", "espeakng-loader"),
)
OPERATORS = (
    *(selective_scan, state_space_dual, causal_conv1d, depthwise_conv1d),
    *(gating, mamba_step, ctc, ctc_prefix),
)
VARIABLES = (
    *("MAMBA_ASR_SCAN_BACKEND", "MAMBA_ASR_CONV_BACKEND", "MAMBA_ASR_STEP_BACKEND"),
    *("MAMBA_ASR_DEPTHWISE_BACKEND", "MAMBA_ASR_GATE_BACKEND", "MAMBA_ASR_DUAL_BACKEND"),
    *("MAMBA_ASR_CTC_BACKEND", "MAMBA_ASR_FRONTEND_BACKEND", "MAMBA_ASR_FEATURES_BACKEND"),
    *("MAMBA_ASR_FEED_FORWARD_BACKEND", "MAMBA_ASR_PREFIX_BACKEND", "OMP_NUM_THREADS"),
)


def versions():
    """Installed packages: {name: version, or 'not installed'}."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit():
    """The checkout's commit, with a mark when files differ from it; else what GIT_COMMIT says."""
    if os.environ.get("GIT_COMMIT"):
        return os.environ["GIT_COMMIT"]
    if shutil.which("git") is None:
        return "unknown (git is not installed)"
    command = ["git", "-C", str(Path(__file__).parents[1]), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown (no git checkout)"


def memory_gib():
    """Physical memory in GiB, or None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):
        return None


def hardware(device):
    """What a device is: 'NVIDIA H200', or '2 CPU cores'."""
    device = torch.device(device)
    if device.type == "cuda":
        count = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        return (f"{count} x " if count > 1 else "") + torch.cuda.get_device_name(device)
    return "Apple GPU" if device.type == "mps" else f"{cores()} CPU cores"


def cores():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def devices():
    """Lines of (device, what it is and which precisions train on it)."""
    lines = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        precisions = "fp32, fp16" + (", bf16" if torch.cuda.is_bf16_supported() else "")
        memory = properties.total_memory / 2**30
        lines.append((f"cuda:{i}", f"{properties.name}, {memory:.0f} GiB; {precisions}"))
    if torch.backends.mps.is_available():
        lines.append(("mps", "Apple GPU; fp32, fp16, bf16 (macOS 14 and later)"))
    processor = platform.processor() or platform.machine()
    lines.append(("cpu", f"{processor}, {cores()} cores; fp32, bf16"))
    return lines


def report():
    """The whole screen as text."""
    memory = memory_gib()
    sections = {
        "Mamba-ASR": [("commit", commit())],
        "System": [
            ("platform", platform.platform()),
            ("python", platform.python_version()),
            ("cores", str(cores())),
            ("memory", "unknown" if memory is None else f"{memory:.1f} GiB"),
        ],
        "Packages": list(versions().items()),
        "Devices (the first is the default)": devices(),
        **{
            operator.__name__.rpartition(".")[2]: list(operator.available_backends().items())
            for operator in OPERATORS
        },
        "Variables": [(name, os.environ[name]) for name in VARIABLES if name in os.environ],
    }
    lines = []
    for title, rows in sections.items():
        if rows:
            lines += [title, *(f"  {name:<17} {value}" for name, value in rows)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
