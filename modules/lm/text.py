"""Sentences from text files, transcripts and folders in LibriSpeech layout."""

import gzip
import re
import zlib
from pathlib import Path

from modules.corpus.manifest import ManifestSource
from modules.errors import UserError
from modules.folders import files_below

MANIFESTS = (".csv", ".jsonl")
TRANSCRIPTS = (".trans.txt", ".trans.txt.gz")  # whose identifiers may be any word
# <speaker>-<chapter>-<utterance> before a transcript.
IDENTIFIER = re.compile(r"[^\s-]+-[^\s-]+-\d+(\s+|$)")


def read_sentences(paths, key):
    """Yield the sentences of files and folders, words one space apart, empty ones left out.

    A file has a sentence a line, or is all `<speaker>-<chapter>-<utterance> TRANSCRIPT` lines; it
    may be gzipped. A folder is read for its `*.trans.txt`, whose ids may be any words, or where
    there are none its `*.txt`. Of a manifest, `.csv` or `.jsonl`, the transcripts are read.
    UserError, which names the option `key`, for what is missing, empty or no UTF-8.
    """
    for path in paths:
        found = False
        for file in files_of(Path(path), key):
            for sentence in sentences_of(file, key):
                found = True
                yield sentence
        if not found:
            raise UserError(f"{key}={path} holds no sentence; give text, a sentence a line")


def files_of(path, key):
    """The text files that a path stands for."""
    if path.is_file():
        return [path]
    if path.exists() and not path.is_dir():
        raise UserError(
            f"{key}={path} is a pipe or a device, and text is read more than once; write it to a "
            "file first"
        )
    if not path.is_dir():
        raise UserError(f"{key}={path} is neither file nor folder; give text, a sentence a line")
    for pattern in ("*.trans.txt", "*.txt"):
        if found := [p for p in files_below(path) if p.match(pattern)]:
            return found
    raise UserError(f"{key}={path} holds no *.trans.txt and no *.txt; give text, a sentence a line")


def sentences_of(file, key):
    """One file's sentences, without the identifiers that lines of transcripts begin with."""
    if file.suffix in MANIFESTS:
        yield from sentences_of_manifest(file, key)
        return
    transcripts = file.name.endswith(TRANSCRIPTS)
    identified = transcripts or all(IDENTIFIER.match(line) for line in lines_of(file, key))
    for line in lines_of(file, key):
        words = line.split()[1:] if identified else line.split()
        if words:
            yield " ".join(words)


def sentences_of_manifest(file, key):
    """The transcripts of a manifest of speech."""
    manifest = ManifestSource(file)
    if manifest.faults:
        fault = manifest.faults[0]
        raise UserError(f"{key}={file}, {fault.where}: {fault.detail}; mend or delete that row")
    for utterance, _ in manifest.rows:
        if utterance.text:
            yield utterance.text


def lines_of(file, key):
    """The lines that hold anything; UserError naming the first that is no UTF-8."""
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError:
                    raise UserError(
                        f"{key}={file}, line {number} is no UTF-8; convert the file, for instance "
                        f"by `iconv -f latin1 -t utf-8 {file}`"
                    ) from None
                if text.strip():
                    yield text
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{key}={file} cannot be read: {error}") from None
