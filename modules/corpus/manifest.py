"""A split as a manifest: `<split>.csv` or `<split>.jsonl`, one utterance a row.

A row that cannot be used is a Fault; a file whose rows cannot be told apart is a UserError.
"""

import csv
import io
import json
import os

from modules.corpus.report import BAD_ROW, NOT_UTF8, Fault, Utterance
from modules.corpus.store import stat_row
from modules.corpus.text import open_regular, read_lines
from modules.errors import UserError

# Our name -> the names it may have in a manifest; the first is SpeechBrain's, NeMo's follow.
COLUMNS = {
    "id": ("ID", "id", "utt_id"),
    "audio": ("wav", "audio_filepath", "audio", "path"),
    "text": ("wrd", "text"),
    "duration": ("duration",),
    "speaker": ("spk_id", "speaker"),
    "offset": ("offset",),
}


class ManifestSource:
    """The utterances of one manifest file; relative audio paths start at its folder."""

    def __init__(self, path):
        self.path = str(path)
        self.root = os.path.dirname(os.path.abspath(path))
        rows = _csv_rows if self.path.lower().endswith(".csv") else _json_rows
        self.rows, self.faults = [], []
        for where, row in rows(self.path):
            if isinstance(row, dict):
                try:
                    self.rows.append(self._utterance(row))
                except RowError as error:
                    row = Fault(BAD_ROW, where, str(error))
            if isinstance(row, Fault):
                self.faults.append(row)
        self.stats = [stat_row(self.path), *(stat_row(u.audio) for u, _ in self.rows)]

    def read(self):
        """Returns (utterances by id, faults, notes)."""
        return sorted((u for u, _ in self.rows), key=lambda u: u.id), self.faults, []

    def stated_durations(self):
        """{id: seconds} of the rows that state a duration."""
        return {u.id: stated for u, stated in self.rows if stated is not None}

    def _utterance(self, row):
        values = {}
        for name, aliases in COLUMNS.items():
            found = [alias for alias in aliases if row.get(alias) is not None]
            values[name] = row[found[0]] if found else None
        for name in ("audio", "text"):
            if not isinstance(values[name], str):
                raise RowError(
                    f"no {' or '.join(COLUMNS[name])} (a string) among "
                    f"{', '.join(map(str, row)) or 'no fields'}"
                )
        for name in ("id", "speaker"):
            if not isinstance(values[name], str | int | float | None):
                raise RowError(f"the {name} is a {type(values[name]).__name__}; give text")
        if not values["audio"].strip():
            raise RowError("the audio path is empty")
        if _number(values["offset"], "offset"):
            raise RowError(
                f"offset={values['offset']}, but segments of a longer file are not supported; cut "
                "the audio into one file a sentence"
            )
        stated = _number(values["duration"], "duration")
        audio = values["audio"].strip()
        if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in audio):
            raise RowError(f"{audio!r} is no path")
        for variable in ("{data_root}", "$data_root"):
            audio = audio.replace(variable, self.root)
        audio = os.path.normpath(os.path.join(self.root, audio))
        name = os.path.splitext(os.path.relpath(audio, self.root))[0].replace(os.sep, "-")
        identity = str(values["id"] or name).strip()
        speaker = str(values["speaker"] or "").strip()
        text = " ".join(values["text"].split())
        return Utterance(identity, audio, text, speaker or "unknown", speaker), stated


class RowError(ValueError):
    """What is wrong with one row."""


def _number(value, name):
    """A number of seconds >= 0, or None where there is none."""
    if value is None or value == "":
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = float("nan")
    if not 0 <= seconds < float("inf"):
        raise RowError(f"{name}={value!r} is not a number of seconds")
    return seconds


def _csv_rows(path):
    """Yield (FILE:LINE, {column: value} or Fault)."""
    with open_regular(path) as file:
        data = file.read()  # the whole text: quoted line feeds are no ends of rows
    text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    reader = csv.reader(io.StringIO(text), skipinitialspace=True, strict=True)
    header = None
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if not row:
                continue
            if header is None:
                header = [name.strip() for name in row]
                _check_header(header, where)
                continue
            if wrong := [field for field in row if not field.isascii() and _escaped(field)]:
                yield where, Fault(NOT_UTF8, where, not_utf8(_escaped(wrong[0])))
            elif len(row) != len(header):
                counts = f"{len(row)} fields, but the header has {len(header)}"
                names = f"({','.join(header)}); quote fields that hold a comma"
                yield where, Fault(BAD_ROW, where, f"{counts} {names}")
            else:
                yield where, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: {error}; correct the quotes") from error


def _escaped(field):
    """The bytes of a field that is not UTF-8, or nothing."""
    raw = field.encode("utf-8", "surrogateescape")
    return raw if raw.decode("utf-8", "replace") != field else b""


def not_utf8(raw):
    return f"not UTF-8 ({raw[:60]!r})"


def _check_header(header, where):
    for name in ("id", "audio", "text"):
        if not set(COLUMNS[name]) & set(header):
            raise UserError(
                f"{where}: no column {' or '.join(COLUMNS[name])} among {','.join(header)}; "
                f"a CSV manifest needs ID,wav,wrd and may add duration,spk_id"
            )


def _json_rows(path):
    """Yield (FILE:LINE, object or Fault)."""
    for number, line, raw in read_lines(path):
        where = f"{path}:{number}"
        if line is None:
            yield where, Fault(NOT_UTF8, where, not_utf8(raw))
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield where, Fault(BAD_ROW, where, f"not JSON ({error}); one object a line is needed")
            continue
        if not isinstance(row, dict):
            row = Fault(
                BAD_ROW,
                where,
                f"{type(row).__name__}, not an object; expected a line like "
                '{"audio_filepath": "a.flac", "text": "HELLO"}',
            )
        yield where, row
