"""Values and objects of a recipe that cannot be meant, told before any work."""

import os
from pathlib import Path

import torch

from modules.errors import UserError
from modules.options import PRECISIONS, is_number

POSITIVE = (
    "number_of_epochs batch_size test_batch_size avg_checkpoints grad_accumulation_factor "
    "max_batch_length_train max_batch_length_val max_batch_ex num_buckets n_warmup_steps "
    "total_steps lr_model lr_adam "
    "max_nonfinite_steps shard_streams shard_window max_batch_tokens max_tokens num_layers "
    "d_model num_encoder_layers num_decoder_layers d_ffn d_state expand d_conv nhead kernel_size "
    "cnn_channels_1 cnn_channels_2 output_neurons valid_search_interval valid_beam_size "
    "test_beam_size sample_rate n_fft win_length hop_length n_mels temperature temperature_lm"
)
SHARES = (
    "dropout mixer_dropout drop_path ema_decay inter_ctc_weight ctc_weight label_smoothing "
    "noise_probability reverberation_probability"
)

RANGES = "noise_snr time_drop_length time_drop_count freq_drop_length freq_drop_count"
TOKENS = {"blank_index": 0, "bos_index": 1, "eos_index": 2}  # of tokenizers and searches


def check_values(values, run_opts):
    """Mistakes in plain values that would otherwise show only after hours, or not at all."""
    for key in POSITIVE.split():
        if is_number(value := values.get(key, 1)) and value <= 0:
            raise UserError(f"{key}={value} must be positive")
    for key in SHARES.split():
        if is_number(value := values.get(key, 0)) and not 0 <= value <= 1:
            raise UserError(f"{key}={value} must be from 0 to 1")
    for key, index in TOKENS.items():
        if values.get(key, index) != index:
            raise UserError(
                f"{key}={values[key]} must be {index}, as tokenizers and searches have it"
            )
    if not 0 <= values.get("seed", 0) < 2**32:
        raise UserError(f"seed={values['seed']} must be from 0 to {2**32 - 1}")
    if "views" in values:
        check_ctc_losses(values)
    check_augmentation(values)
    check_window(values)
    for key in ("num_workers", "audio_cache_mb", "weight_decay"):
        if values.get(key, 0) < 0:
            raise UserError(f"{key}={values[key]} must be 0 or more")
    if values.get("normalize_until_epoch", 2) < 2:
        raise UserError(
            f"normalize_until_epoch={values['normalize_until_epoch']} leaves no epoch to measure "
            "the features in; use 2 or more"
        )
    for key in ("train_splits", "dev_splits", "test_splits"):
        if key in values and not values[key]:
            raise UserError(f"{key} is empty; name at least one split of {values['data_folder']}")
    for key, precision in (
        ("precision", values["precision"]),
        ("eval_precision", run_opts["eval_precision"]),
    ):
        if precision not in PRECISIONS:
            raise UserError(f"{key}={precision!r} is unknown; use {', '.join(PRECISIONS)}")
        if precision == "fp16" and run_opts["device"] == "cpu":
            raise UserError(f"{key}=fp16 does not run on the CPU; use --{key} bf16 or fp32")
    for key in ("output_folder", "save_folder"):
        if not values[key]:
            raise UserError(f"{key} is empty; give a folder, which is made if need be")
        check_writable(key, Path(values[key]))


def check_ctc_losses(values):
    """UserError where what is to help the CTC loss does not fit together."""
    views, weight = values["views"], values["consistency_weight"]
    if views not in (1, 2):
        raise UserError(f"views={views}: every utterance has 1 view in a batch, or 2")
    if weight < 0 or (weight and views == 1):
        raise UserError(
            f"consistency_weight={weight} compares two views; give --views 2 and a positive "
            "weight, such as 0.2, or a weight of 0"
        )
    layers, count = values["inter_ctc_layers"], values["num_encoder_layers"]
    if values["drop_path"] == 1:
        raise UserError("drop_path=1 would leave out all branches of the last layer; use 0.2")
    if values.get("ema_decay", 0) == 1:
        raise UserError("ema_decay=1 would never leave the first step's weights; use 0.999")
    if any(not isinstance(n, int) or not 1 <= n < count for n in layers):
        raise UserError(
            f"inter_ctc_layers={layers} must be numbers of layers below the last one, 1 to "
            f"{count - 1}"
        )


def check_window(values):
    """UserError when the window has more samples than the Fourier transform."""
    if not {"win_length", "sample_rate", "n_fft"} <= values.keys():
        return
    samples = round(values["win_length"] * values["sample_rate"] / 1000)
    if samples > values["n_fft"]:
        raise UserError(
            f"win_length={values['win_length']} ms are {samples} samples, more than "
            f"n_fft={values['n_fft']}; give an n_fft of at least that"
        )


def check_augmentation(values):
    """UserError for speeds and levels of noise that cannot be meant."""
    speeds = values.get("speeds", [100])
    if not speeds or not all(is_number(speed) and speed > 0 for speed in speeds):
        raise UserError(f"speeds={speeds} must be percentages, such as [95, 100, 105]; [100]: none")
    for name in RANGES.split():
        low, high = (values.get(f"{name}_{end}", 0) for end in ("low", "high"))
        if low > high:
            raise UserError(f"{name}_low={low} is above {name}_high={high}; give the lower first")
        if low == high and name.endswith("length") and f"{name}_high" in values:
            raise UserError(
                f"{name}_high={high} is one more than the longest; give more than {name}_low={low}"
            )


def check_writable(key, folder):
    """UserError unless the folder is there or can be made, and written to."""
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not place.is_dir():
        raise UserError(f"{key}={folder}: {place} is a file; give another --{key}")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{key}={folder}: no permission to write to {place}; give another --{key}")


# ---- Objects ----


def check_objects(hparams):
    """Objects that were made, and do not fit each other or cannot do their work."""
    check_alphabet(hparams)
    check_sizes(hparams)
    check_head(hparams, "ctc_head", "encoder")
    check_head(hparams, "seq_head", "decoder")
    check_optimizer(hparams)


def check_alphabet(hparams):
    """UserError unless the head has an output a character."""
    tokens = hparams["tokenizer"]
    if hasattr(tokens, "labels") and len(tokens) != hparams["output_neurons"]:
        raise UserError(
            f"output_neurons={hparams['output_neurons']} does not fit the alphabet, which with "
            f"blank, bos and eos has {len(tokens)}; set --output_neurons {len(tokens)}"
        )


def check_sizes(hparams):
    """UserError unless the encoder takes what the frontend gives."""
    given = getattr(hparams.get("frontend"), "output_size", None)
    layer = getattr(hparams.get("encoder"), "input_layer", None)
    if given is not None and layer is not None and layer[0].in_features != given:
        raise UserError(
            f"the encoder's input_size={layer[0].in_features} does not fit the frontend, which "
            f"gives {given} channels a frame; set its channels, or --encoder "
            f'"{{input_size: {given}}}"'
        )


def check_head(hparams, key, below):
    """UserError unless a head takes what is below it, and has an output a token."""
    head, norm = hparams.get(key), getattr(hparams.get(below), "norm", None)
    if not isinstance(head, torch.nn.Linear) or not isinstance(norm, torch.nn.LayerNorm):
        return
    width = norm.normalized_shape[-1]
    if head.in_features != width:
        raise UserError(
            f"{key}: in_features={head.in_features} does not fit the {below}, which gives {width}"
        )
    if head.out_features != hparams["output_neurons"]:
        raise UserError(
            f"{key}: out_features={head.out_features} does not fit "
            f"output_neurons={hparams['output_neurons']}"
        )


def check_optimizer(hparams):
    """UserError where no optimizer can be made, or the rate's schedule has no first step."""
    try:
        hparams["opt_class"]([torch.nn.Parameter(torch.zeros(1))])
    except (TypeError, ValueError) as error:
        raise UserError(f"opt_class makes no optimizer: {error}") from error
    for name in ("n_warmup_steps", "total_steps"):
        if getattr(hparams.get("lr_scheduler"), name, 1) <= 0:
            value = getattr(hparams["lr_scheduler"], name)
            raise UserError(f"lr_scheduler: {name}={value} must be positive")
