"""A split as a folder in LibriSpeech layout: audio files with `*.trans.txt` files beside them."""

import os
from collections import defaultdict

from modules.corpus.report import (
    DUPLICATE,
    NO_AUDIO,
    NO_TEXT,
    NO_TRANSCRIPT_FILE,
    NOT_UTF8,
    Fault,
    Utterance,
)
from modules.corpus.store import stat_row
from modules.corpus.text import read_lines
from modules.errors import UserError

AUDIO_SUFFIXES = (".flac", ".wav")
TRANSCRIPT_SUFFIX = ".trans.txt"


class FolderSource:
    """All audio and transcripts below `path`, however deep; hidden files are passed over."""

    def __init__(self, path):
        self.path = str(path)
        self.audio, self.transcripts, self.stats = [], [], []
        self._walk(self.path, seen=set())

    def _walk(self, folder, seen):
        try:
            status = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except PermissionError as error:
            raise UserError(f"{folder} cannot be read ({error.strerror}); grant access") from error
        if (status.st_dev, status.st_ino) in seen:  # a link back up
            return
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            name = entry.name.lower()
            if name.startswith("."):
                continue
            if entry.is_dir():
                self._walk(entry.path, seen)
            elif name.endswith((*AUDIO_SUFFIXES, TRANSCRIPT_SUFFIX)):
                self.stats.append(stat_row(entry.path))
                is_text = name.endswith(TRANSCRIPT_SUFFIX)
                (self.transcripts if is_text else self.audio).append(entry.path)

    def read(self):
        """Pair audio with text; returns (utterances by id, faults, notes)."""
        texts, faults, notes = self._read_transcripts()
        has_transcript = {os.path.dirname(path) for path in self.transcripts}
        utterances = []
        used = set()
        for path in self.audio:
            folder, name = os.path.split(path)
            key = os.path.splitext(name)[0]
            used.add(key)
            if key in texts:
                if texts[key] is not None:  # else reported already
                    utterances.append(self._utterance(key, path, texts[key][0]))
            elif folder not in has_transcript:
                expected = f"expected a {TRANSCRIPT_SUFFIX} file in {folder}"
                faults.append(Fault(NO_TRANSCRIPT_FILE, path, expected))
            else:
                faults.append(Fault(NO_TEXT, path))
        for key in sorted(texts.keys() - used):
            if texts[key] is not None:
                faults.append(Fault(NO_AUDIO, texts[key][1], key))
        return sorted(utterances, key=lambda u: u.id), faults, notes

    def _read_transcripts(self):
        """Map id -> (text, FILE:LINE), or None where a fault says why there is no text."""
        lines = defaultdict(list)
        faults, notes = [], []
        texts = {}
        for path in self.transcripts:
            for number, line, raw in read_lines(path):
                where = f"{path}:{number}"
                if line is None:
                    key = raw.split()[0].decode("utf-8", "replace")
                    faults.append(Fault(NOT_UTF8, where, repr(raw[:60])))
                    texts[key] = None
                else:
                    key, *words = line.split()
                    lines[key].append((" ".join(words), where))
        for key, found in lines.items():
            if len({text for text, _ in found}) > 1:
                places = ", ".join(where for _, where in found)
                faults.append(Fault(DUPLICATE, found[0][1], f"{key} has different texts: {places}"))
                texts[key] = None
                continue
            if len(found) > 1:
                notes.append(f"{key} has the same text {len(found)} times: {found[1][1]}")
            texts.setdefault(key, found[0])
        return texts, faults, notes

    def _utterance(self, key, path, text):
        """The reader and chapter come from the id, else the reader from the first folder."""
        parts = key.split("-")
        if len(parts) >= 3:
            speaker, spk_id = parts[0], "-".join(parts[:2])
        else:
            inner = os.path.relpath(path, self.path).split(os.sep)
            speaker = spk_id = inner[0] if len(inner) > 1 else ""
        return Utterance(key, os.path.abspath(path), text, spk_id or "unknown", speaker)
