"""A split as a manifest: `<split>.csv` or `<split>.jsonl`, one utterance a row."""

import csv
import io
import json
import os

from modules.corpus.report import Utterance
from modules.corpus.store import stat_row
from modules.corpus.text import read_lines
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
        self.rows = [self._utterance(row, where) for where, row in rows(self.path)]
        self.stats = [stat_row(self.path), *(stat_row(u.audio) for u, _ in self.rows)]

    def read(self):
        """Returns (utterances by id, no faults: rows that cannot be read raise, notes)."""
        utterances = sorted((u for u, _ in self.rows), key=lambda u: u.id)
        return utterances, [], []

    def stated_durations(self):
        """{id: seconds} of the rows that state a duration."""
        return {u.id: stated for u, stated in self.rows if stated is not None}

    def _utterance(self, row, where):
        values = {}
        for name, aliases in COLUMNS.items():
            found = [alias for alias in aliases if row.get(alias) is not None]
            values[name] = row[found[0]] if found else None
        for name in ("audio", "text"):
            if not isinstance(values[name], str):
                raise UserError(
                    f"{where}: no {' or '.join(COLUMNS[name])} (a string) among "
                    f"{', '.join(map(str, row)) or 'no fields'}; add it"
                )
        if not values["audio"].strip():
            raise UserError(f"{where}: the audio path is empty; give one, or remove the row")
        if _number(values["offset"], "offset", where):
            raise UserError(
                f"{where}: offset={values['offset']}, but segments of a longer file are not "
                f"supported; cut the audio into one file a sentence"
            )
        stated = _number(values["duration"], "duration", where)
        audio = values["audio"].strip()
        for variable in ("{data_root}", "$data_root"):
            audio = audio.replace(variable, self.root)
        audio = os.path.normpath(os.path.join(self.root, audio))
        name = os.path.splitext(os.path.relpath(audio, self.root))[0].replace(os.sep, "-")
        identity = str(values["id"] or name).strip()
        speaker = str(values["speaker"] or "").strip()
        text = " ".join(values["text"].split())
        return Utterance(identity, audio, text, speaker or "unknown", speaker), stated


def _number(value, name, where):
    """A number of seconds >= 0, or None where there is none."""
    if value is None or value == "":
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = float("nan")
    if not 0 <= seconds < float("inf"):
        raise UserError(f"{where}: {name}={value!r} is not a number of seconds; correct the row")
    return seconds


def _text_lines(path):
    for number, line, raw in read_lines(path):
        if line is None:
            raise UserError(
                f"{path}:{number}: not UTF-8 ({raw[:60]!r}); convert the file: "
                f"iconv -f latin1 -t utf-8"
            )
        yield number, line


def _csv_rows(path):
    """Yield (FILE:LINE, {column: value})."""
    for _ in _text_lines(path):
        pass  # UTF-8 throughout; the reader below needs the whole text, quoted line feeds too
    with open(path, encoding="utf-8-sig", newline="") as file:
        text = file.read()
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
            if len(row) != len(header):
                raise UserError(
                    f"{where}: {len(row)} fields, but the header has {len(header)} "
                    f"({','.join(header)}); quote fields that hold a comma"
                )
            yield where, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: {error}; correct the quotes") from error


def _check_header(header, where):
    for name in ("id", "audio", "text"):
        if not set(COLUMNS[name]) & set(header):
            raise UserError(
                f"{where}: no column {' or '.join(COLUMNS[name])} among {','.join(header)}; "
                f"a CSV manifest needs ID,wav,wrd and may add duration,spk_id"
            )


def _json_rows(path):
    """Yield (FILE:LINE, object)."""
    for number, line in _text_lines(path):
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON ({error}); one object a line is needed") from error
        if not isinstance(row, dict):
            raise UserError(
                f"{where}: {type(row).__name__}, not an object; expected a line like "
                f'{{"audio_filepath": "a.flac", "text": "HELLO"}}'
            )
        yield where, row
