"""Checks of what the user asked the preparation for, before any file is read."""

import math
import os

from modules.corpus.split import find_splits
from modules.errors import UserError


def names_of(value):
    """A name or several -> list of names, each once; YAML reads 2024 as a number."""
    return [value] if isinstance(value, str) else list(dict.fromkeys(map(str, value or ())))


def check_options(data_folder, splits, merge_lst, merge_name, max_bad_fraction, limits):
    """Raise UserError for options that cannot be meant."""
    if not os.path.isdir(data_folder):
        hint = "give the folder that holds it, and its stem as a split name"
        if not os.path.exists(data_folder):
            hint = "check the path, or download the corpus: https://www.openslr.org/12"
        raise UserError(f"data_folder={data_folder} is not an existing folder; {hint}")
    if not splits:
        raise UserError(
            f"no split was named; name some of those in {data_folder}: "
            f"{', '.join(find_splits(data_folder)) or '-'}"
        )
    for name in [*splits, merge_name or "plain"]:
        if name in ("", ".", "..") or os.path.basename(name) != name:
            raise UserError(f"{name!r} is not a plain name; give one without a folder")
    if unknown := [split for split in merge_lst if split not in splits]:
        raise UserError(
            f"merge_lst has {', '.join(unknown)}, which is not among the splits to prepare "
            f"({', '.join(splits)}); name it in tr_splits too"
        )
    if merge_lst and not merge_name:
        raise UserError(f"merge_lst={merge_lst} has no merge_name; give one, such as train.csv")
    if not 0 <= max_bad_fraction <= 1:
        raise UserError(f"max_bad_fraction={max_bad_fraction} is not between 0 and 1")
    if not 0 <= limits["max_clipped"] <= 1:
        raise UserError(f"max_clipped={limits['max_clipped']} is not between 0 and 1")
    longest = math.inf if limits["max_seconds"] is None else limits["max_seconds"]
    if not 0 <= limits["min_seconds"] < longest:
        raise UserError(
            f"min_seconds={limits['min_seconds']}, max_seconds={limits['max_seconds']}: "
            f"expected 0 <= min_seconds < max_seconds"
        )


def sentences_per_split(select_n_sentences, splits):
    """None, a number, or a list with one entry a split -> {split: number or None}."""
    numbers = select_n_sentences
    if not isinstance(numbers, (list, tuple)):
        numbers = [numbers] * len(splits)
    if len(numbers) != len(splits):
        raise UserError(
            f"select_n_sentences={list(numbers)} has {len(numbers)} entries for {len(splits)} "
            f"splits ({', '.join(splits)}); give one number, or one a split"
        )
    for number in numbers:
        if number is not None and (not isinstance(number, int) or number < 1):
            raise UserError(f"select_n_sentences={number!r}: expected a whole number above 0")
    return dict(zip(splits, numbers, strict=True))


def check_outputs(save_folder, sources, merge_lst, merge_name):
    """Outputs must overwrite neither an input nor each other."""
    names = [f"{split}.csv" for split in sources]
    if merge_lst and merge_name in names and [merge_name] != [f"{m}.csv" for m in merge_lst]:
        raise UserError(
            f"merge_name={merge_name}, the manifest of all {len(merge_lst)} training splits, is "
            f"also that of split {merge_name[:-4]!r}; rename the split, or train on it alone"
        )
    for split, source in sources.items():
        if os.path.realpath(source.path) == os.path.realpath(
            os.path.join(save_folder, f"{split}.csv")
        ):
            raise UserError(
                f"save_folder={save_folder} would overwrite the input {source.path}; "
                f"choose another save_folder"
            )
