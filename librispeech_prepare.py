"""LibriSpeech folder (or any corpus in its layout, or manifests) -> SpeechBrain CSV manifests.

python librispeech_prepare.py LibriSpeech manifests --train train-clean-100 --dev dev-clean
"""

import argparse
import logging
import os

from modules.command import count, plain_errors
from modules.corpus.options import check_options, check_outputs, names_of, sentences_per_split
from modules.corpus.publish import QUARANTINE, REPORT, publish_reports, write_manifests
from modules.corpus.report import note_overlaps
from modules.corpus.shards import write_shards
from modules.corpus.split import open_split, read_split
from modules.corpus.store import fingerprint, locked, unchanged
from modules.errors import UserError

logger = logging.getLogger(__name__)

VERSION = 2  # of what is written; a new one makes every folder prepare again


def prepare_librispeech(
    data_folder,
    save_folder,
    tr_splits=(),
    dev_splits=(),
    te_splits=(),
    select_n_sentences=None,
    merge_lst=(),
    merge_name=None,
    skip_prep=False,
    *,
    sample_rate=16000,
    min_seconds=0.1,
    max_seconds=60.0,
    max_clipped=0.01,
    allowed_characters=None,
    max_bad_fraction=0.05,
    headers_only=False,
    workers=None,
):
    """Write `<save_folder>/<split>.csv` (ID, duration, wav, spk_id, wrd) for every split.

    A split is a folder `<data_folder>/<split>/` in LibriSpeech layout (.flac or .wav), or a
    manifest `<data_folder>/<split>.csv` (ID, wav, wrd) or `.jsonl` (audio_filepath, text).
    Text is kept as it is, runs of blanks aside. Sentences are in order of their ids.

    What cannot be used (audio that is broken, cut off, silent, clipped or of another rate, no
    text, an id given twice ...) is left out, and never silently: counts and examples go to the
    log, every path to `<save_folder>/quarantine.tsv` and, for people, `prepare_report.txt`. More
    than `max_bad_fraction` of a split left out, or nothing usable in it, is an error, and no
    manifest is written then.

    Nothing is done if the folder already holds what the same options would write from the same
    files (by size and time of change). Files come into place complete or not at all.

    Arguments
    ---------
    data_folder, save_folder : where the corpus is, and where the manifests go.
    tr_splits, dev_splits, te_splits : names of splits for training, development and test.
    select_n_sentences : None, or how many sentences of each split; a list has one entry a split.
    merge_lst, merge_name : these splits together also become `<save_folder>/<merge_name>`.
    skip_prep : do nothing at all.
    sample_rate : expected, in Hz.
    min_seconds, max_seconds : audio outside of this is left out; `max_seconds=None`: no limit.
    max_clipped : the share of an utterance's samples that may be at full scale.
    allowed_characters : the characters that text may have, besides the space; None: any.
    max_bad_fraction : the share of a split that may be left out (0: none at all).
    headers_only : believe the headers and the ends of audio files instead of decoding them.
    workers : threads that open audio files; None: two a CPU.

    Raises UserError for whatever the user can put right.
    """
    if skip_prep:
        return
    data_folder, save_folder = os.path.abspath(data_folder), os.path.abspath(save_folder)
    config = {
        "version": VERSION,
        "data_folder": data_folder,
        "groups": [names_of(s) for s in (tr_splits, dev_splits, te_splits)],
        "merge": [names_of(merge_lst), merge_name],
        "limits": {
            "sample_rate": sample_rate,
            "min_seconds": min_seconds,
            "max_seconds": max_seconds,
            "max_clipped": max_clipped,
            "headers_only": headers_only,
        },
        "allowed_characters": None if allowed_characters is None else [*allowed_characters],
        "max_bad_fraction": max_bad_fraction,
    }
    sources = _open_splits(config, save_folder, select_n_sentences)
    with locked(save_folder):
        if _prepared_before(save_folder, config):
            return
        reports = _read_splits(sources, config, workers)
        publish_reports(save_folder, config, reports)
        write_manifests(save_folder, config, reports)


def _open_splits(config, save_folder, select_n_sentences):
    """{split: what lists its utterances}; UserError for options that cannot be meant.

    The sentences wanted of each split, and its files' state, join the configuration.
    """
    splits = [name for group in config["groups"] for name in group]
    check_options(
        config["data_folder"],
        splits,
        *config["merge"],
        config["max_bad_fraction"],
        config["limits"],
    )
    config["wanted"] = sentences_per_split(select_n_sentences, splits)
    sources = {split: open_split(config["data_folder"], split) for split in splits}
    check_outputs(save_folder, sources, *config["merge"])
    _make_folder(save_folder)
    config["files"] = {split: fingerprint(source.stats) for split, source in sources.items()}
    return sources


def _prepared_before(save_folder, config):
    """Whether the folder holds what would be written; its losses are told again."""
    losses = unchanged(save_folder, config)
    if losses is None:
        return False
    logger.info("%s: prepared before, nothing has changed", save_folder)
    for line in losses:
        logger.warning("%s; see %s", line, os.path.join(save_folder, REPORT))
    return True


def _read_splits(sources, config, workers):
    """{split: its report}: every recording and text is looked at."""
    workers = workers or 2 * (os.cpu_count() or 1)
    characters, limits = config["allowed_characters"], config["limits"]
    reports = {
        split: read_split(split, source, config["wanted"][split], characters, workers, **limits)
        for split, source in sources.items()
    }
    note_overlaps(config["groups"], reports)
    return reports


def _make_folder(save_folder):
    try:
        os.makedirs(save_folder, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"save_folder={save_folder} cannot be made ({error.strerror}); choose another"
        ) from error
    if not os.access(save_folder, os.W_OK):
        raise UserError(f"save_folder={save_folder} cannot be written to; choose another")


def parser():
    p = argparse.ArgumentParser(
        description="Turn a speech corpus into the CSV manifests that training and testing read.",
        epilog="A split is a folder DATA_FOLDER/SPLIT in LibriSpeech layout "
        "(speaker/chapter/speaker-chapter-number.flac with speaker-chapter.trans.txt), or a "
        "manifest DATA_FOLDER/SPLIT.csv with columns ID,wav,wrd, or DATA_FOLDER/SPLIT.jsonl "
        'with lines like {"audio_filepath": "a.flac", "text": "HELLO"}. '
        "Audio must be mono and of one sample rate. Sentences that cannot be used are left out "
        f"and listed in SAVE_FOLDER/{QUARANTINE} and, with remedies, in {REPORT}. Example: "
        "python librispeech_prepare.py /data/LibriSpeech manifests --train train-clean-100 "
        "train-clean-360 --dev dev-clean --test test-clean test-other --merge train.csv",
    )
    p.add_argument("data_folder", help="where the splits are")
    p.add_argument("save_folder", help="where the manifests go")
    p.add_argument("--train", nargs="+", default=[], metavar="SPLIT", help="training splits")
    p.add_argument("--dev", nargs="+", default=[], metavar="SPLIT", help="development splits")
    p.add_argument("--test", nargs="+", default=[], metavar="SPLIT", help="test splits")
    p.add_argument(
        "--merge", metavar="NAME", help="also write all training splits into one file, as train.csv"
    )
    p.add_argument("--sentences", type=int, metavar="N", help="only the first N of each split")
    p.add_argument("--sample-rate", type=count, default=16000, help="in Hz (%(default)s)")
    p.add_argument(
        "--min-seconds", type=float, default=0.1, help="shorter audio is left out (%(default)s)"
    )
    p.add_argument(
        "--max-seconds",
        type=float,
        default=60.0,
        help="longer audio is left out (%(default)s; inf: none)",
    )
    p.add_argument(
        "--characters", metavar="SET", help="characters allowed in text besides the space (any)"
    )
    p.add_argument(
        "--max-bad-fraction",
        type=float,
        default=0.05,
        help="share of a split that may be left out before it is an error (%(default)s)",
    )
    p.add_argument(
        "--strict",
        dest="max_bad_fraction",
        action="store_const",
        const=0.0,
        help="the same as --max-bad-fraction 0: nothing may be left out",
    )
    p.add_argument(
        "--max-clipped",
        type=float,
        default=0.01,
        help="share of an utterance's samples that may be at full scale (%(default)s; 1: all)",
    )
    p.add_argument(
        "--headers-only",
        action="store_true",
        help="do not decode the audio: quicker, and NaN, silence, clipping and damage in the "
        "middle go unseen",
    )
    p.add_argument("--workers", type=count, help="threads that open audio (two a CPU)")
    p.add_argument(
        "--shards",
        metavar="FOLDER",
        help="also write the training splits there as tar files for WebDataset, which training "
        "reads with --train_shards FOLDER (docs/synthetic.md)",
    )
    p.add_argument(
        "--shard-megabytes", type=float, default=64.0, help="size of such a file (%(default)s)"
    )
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with plain_errors("interrupted; give the same command again"):
        prepare_librispeech(
            args.data_folder,
            args.save_folder,
            args.train,
            args.dev,
            args.test,
            select_n_sentences=args.sentences,
            merge_lst=args.train if args.merge else [],
            merge_name=args.merge,
            sample_rate=args.sample_rate,
            min_seconds=args.min_seconds,
            max_seconds=args.max_seconds,
            max_clipped=args.max_clipped,
            allowed_characters=args.characters,
            max_bad_fraction=args.max_bad_fraction,
            headers_only=args.headers_only,
            workers=args.workers,
        )
        for split in args.train if args.shards else []:
            count = write_shards(args.save_folder, split, args.shards, args.shard_megabytes)
            logger.info("%s: %d shards in %s", split, count, args.shards)


if __name__ == "__main__":
    main()
