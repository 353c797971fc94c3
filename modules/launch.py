"""From a command line to hparams, device and process group; a user's mistake gets one line."""

import dataclasses
import gc
import logging
import os
import platform
import sys
import time
from pathlib import Path

import speechbrain as sb
import torch
from speechbrain.utils.checkpoints import CKPT_PREFIX

from modules.checks import check_objects, check_values
from modules.errors import Stopped, UserError
from modules.ops import selective_scan
from modules.options import describe, load, read_options, top_level, yaml_path
from modules.signals import EXIT_STOPPED
from modules.tensors import check_environment

# Who imports that is warned that figures cannot be saved; there are none here.
logging.getLogger("speechbrain.utils.train_logger").addFilter(lambda r: "torchvision" not in r.msg)

FFT_PLANS = 64  # of features, rooms and noise, for a few sizes of a batch
HELP = """Train and evaluate a speech recogniser.

usage: python {script} HPARAMS.yaml [--key value ...]
       torchrun --nproc-per-node N {script} HPARAMS.yaml [--key value ...]

Any top-level key of the YAML file can be given on the command line. Examples:

  python {script} {example} --data_folder /data/LibriSpeech
  python {script} {example} --data_folder /data/LibriSpeech \\
      --train_splits "[train-clean-100]" --number_of_epochs 30 --precision fp32
  python {script} {example} --skip_train True  # evaluate it
  python {script} HPARAMS.yaml --help            # the keys of one file, with their defaults

Running the same command again continues a run that was interrupted. Results: train_log.txt and
wer_<test set>.txt in output_folder. Environment: python -m modules.environment

A YAML file can run any code, even for its --help: use none that you have not read, or whose
author you do not trust (docs/untrusted.md). Checkpoints are read as weights alone.

HPARAMS.yaml is one of these, or a copy that you changed:

  {available}
"""


def run(main, script, example, text=HELP):
    """Call `main(argv)`; print a `UserError` without a stack trace and exit with status 2.

    Without arguments the help `text` is shown. Status 75 tells that a signal ended the run and the
    same command goes on.
    """
    try:
        argv = sys.argv[1:]
        if not argv or argv[0] in ("-h", "--help"):
            available = "\n  ".join(sorted(str(p) for p in Path(example).parent.glob("*.yaml")))
            print(text.format(script=script, example=example, available=available or "none here"))
            sys.exit(0 if argv else 2)
        main(argv)
    except UserError as error:
        # Most mistakes meet every rank, and one tells. The others wait for torchrun to end them;
        # who is still there after that is the only one that met it.
        if int(os.environ.get("RANK", "0")) > 0:
            time.sleep(10)
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except RuntimeError as error:
        if not is_of_another_process(error):
            raise
        print(
            f"\nerror: another process ended or does not answer ({error}); its own message says "
            "why. The same command goes on from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(1)
    except Stopped as stopped:
        if sb.utils.distributed.if_main_process():
            print(f"\n{stopped}", file=sys.stderr, flush=True)
        sys.exit(EXIT_STOPPED)
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to continue", file=sys.stderr)
        sys.exit(130)
    finally:
        leave_process_group()


def is_of_another_process(error):
    """Whether the processes' exchange failed, and not this process's own work."""
    if not torch.distributed.is_available():
        return False
    return isinstance(error, torch.distributed.DistBackendError) or "gloo" in str(error)


def leave_process_group():
    """Leave while Python is whole.

    Gloo's threads may still hold tensors of the last exchange. Those that let go of them only
    when the interpreter ends abort the process (github.com/pytorch/pytorch/pull/179291), so what
    the run made goes first: its modules are freed only by the collector.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()
        gc.collect()


def start(argv):
    """Read the YAML file with the overrides, choose the device, join the process group.

    Returns (path of the YAML file, hparams, run options, overrides).
    Raises UserError for an unknown file, key, value or device.
    """
    check_environment()
    path = yaml_path(argv[0])
    defaults = top_level(path)
    if "-h" in argv or "--help" in argv:
        print(describe(path, defaults))
        sys.exit(0)
    run_opts, overrides = read_options(argv, defaults)
    if run_opts.test_only:
        if "skip_train" not in defaults:
            raise UserError(
                f"{path} lacks the key skip_train, which --test_only sets to True; add the line "
                "skip_train: False"
            )
        overrides["skip_train"] = True
    run_opts = choose_device(run_opts)
    limit_fft_plans(run_opts.device)
    let_memory_grow(run_opts.device)
    values = top_level(path, overrides)
    check_values(values, run_opts)
    check_compilation(run_opts, values.get("scan_backend", "auto"))
    check_debugging(run_opts, values)
    # The process group comes first: what the YAML file creates may ask for the rank.
    sb.utils.distributed.ddp_init_group(run_opts)
    hparams = load(path, overrides)
    check_objects(hparams)
    selective_scan.set_backend(hparams.get("scan_backend", "auto"))
    return path, hparams, run_opts, overrides


def on_main(function, *args, **kwargs):
    """Call on the main process while the others wait; its UserError is every process's."""
    failure = [None]
    if sb.utils.distributed.if_main_process():
        try:
            function(*args, **kwargs)
        except UserError as error:
            failure = [str(error)]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise UserError(failure[0])


def check_debugging(run_opts, values):
    """UserError where --debug finds no checkpoint, or would write over a training's results."""
    if not run_opts.debug or run_opts.debug_persistently:
        return
    if values.get("skip_train") and not values.get("resume"):
        raise UserError(
            "--debug has checkpoints in a temporary folder alone, so there is none to test; add "
            "--resume OUTPUT_FOLDER and another --output_folder, or --debug_persistently"
        )
    folder = Path(str(values.get("save_folder", "")))
    if any(folder.glob(f"{CKPT_PREFIX}+*")):
        raise UserError(
            f"{folder} holds a training's checkpoints, and --debug would write its own summary and "
            "wer_*.txt over that training's; give another --output_folder"
        )


def check_compilation(run_opts, scan_backend):
    """UserError where --compile has no kernels to compile the layers around."""
    if not run_opts.compile or run_opts.compile_module_keys:
        return
    if not run_opts.device.startswith("cuda"):
        raise UserError(
            f"--compile needs a CUDA device, and this run is on {run_opts.device}; leave it out"
        )
    if run_opts.compile_mode not in ("default", "reduce-overhead"):
        raise UserError(
            f"--compile_mode {run_opts.compile_mode} is unknown here; use default, or "
            "reduce-overhead for CUDA graphs"
        )
    scan_backend = os.environ.get("MAMBA_ASR_SCAN_BACKEND") or scan_backend
    if scan_backend not in ("auto", "triton"):
        raise UserError(
            f"--compile goes with the triton kernels, not with scan_backend={scan_backend} (or "
            "MAMBA_ASR_SCAN_BACKEND); leave out one of them"
        )


def choose_device(run_opts):
    """Fill in the device (the best present) and the backend of a distributed launch."""
    device = check_device(run_opts["device"] or best_device())
    local_rank = os.environ.get("LOCAL_RANK")
    chosen = {"device": device}
    if local_rank is not None:
        if device.startswith("cuda"):
            device = check_device(f"cuda:{local_rank}")
        elif device == "mps":
            device = "cpu"  # one Mac has one GPU
        chosen = {"device": device}
        if "distributed_backend" not in run_opts.overridden_args:
            chosen["distributed_backend"] = "nccl" if device.startswith("cuda") else "gloo"
    return dataclasses.replace(
        run_opts, **chosen, overridden_args=run_opts.overridden_args | set(chosen)
    )


def limit_fft_plans(device):
    """Let PyTorch keep few of cuFFT's plans.

    It keeps 4,096, each for one size of a batch and with memory of its own: batches of all sizes
    fill a GPU with them within minutes (github.com/pytorch/pytorch/issues/94893).
    """
    if device.startswith("cuda"):
        plans, index = torch.backends.cuda.cufft_plan_cache, torch.device(device).index
        (plans if index is None else plans[index]).max_size = FFT_PLANS


def let_memory_grow(device):
    """Let PyTorch's allocator map memory to the end of what it has, in place of further pieces.

    Batches of many sizes leave gaps between pieces, and so do CUDA graphs: half a gigabyte of 3.9
    of ConMamba-L's. What the user has set about the allocator stays. In Windows' Linux the first
    allocation may fail so (github.com/pytorch/pytorch/issues/192330).
    """
    set_by_user = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys()
    able = sys.platform == "linux" and "microsoft" not in platform.release().lower()
    if device.startswith("cuda") and able and not set_by_user:
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def best_device():
    """cuda, mps or cpu, the first that is present."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(name):
    """The device's name, or a UserError saying what is present."""
    kind, _, index = name.partition(":")
    if kind == "cpu":
        return "cpu"
    if kind == "mps":
        if torch.backends.mps.is_available():
            return "mps"
        raise UserError(f"device={name} is not present on this machine; use {best_device()}")
    if kind != "cuda" or (index and not index.isdigit()):
        raise UserError(f"device={name!r} is unknown; use cuda, cuda:N, mps or cpu")
    count = torch.cuda.device_count()
    if count == 0:
        raise UserError(f"device={name}: PyTorch sees no CUDA device; use {best_device()}")
    if index and int(index) >= count:
        raise UserError(
            f"device={name}: there are {count} CUDA devices; use cuda:0 to cuda:{count - 1}"
        )
    return name
