"""What a preparation writes: its reports, or why the corpus is not fit; then the manifests."""

import logging
import math
import os
from collections import Counter

from modules.corpus.report import EXAMPLES, quarantine_text, text_report
from modules.corpus.store import manifest_text, remember, write_files
from modules.errors import UserError

logger = logging.getLogger(__name__)

REPORT, QUARANTINE = "prepare_report.txt", "quarantine.tsv"


def publish_reports(save_folder, config, reports):
    """Log and write the report; raises UserError if a split is not fit for use."""
    write_files(
        save_folder,
        {
            REPORT: text_report(config["data_folder"], reports.values()),
            QUARANTINE: quarantine_text(reports.values()),
        },
    )
    path = os.path.join(save_folder, REPORT)
    refused = []
    for report in reports.values():
        if not report.usable or report.bad_fraction > config["max_bad_fraction"]:
            refused.append(report)
            continue
        level = logging.WARNING if report.faults or report.notes else logging.INFO
        logger.log(level, "\n".join([report.summary(), *report.lines(EXAMPLES)]))
    if not refused:
        return
    lines = []
    for report in refused:
        lines += [report.summary(), *report.lines(EXAMPLES)]
        if not report.usable and not report.faults:
            lines.append("  the split is empty: no audio (.flac, .wav) and no text was found")
    fix = "mend the corpus"
    if all(report.usable for report in refused):
        worst = max(report.bad_fraction for report in refused)
        fix += f", or accept the loss with max_bad_fraction={math.ceil(worst * 100) / 100}"
    raise UserError("\n".join([*lines, f"No manifest was written; {fix}. Full list: {path}"]))


def check_merged(utterances, merge_name):
    """SpeechBrain wants every id once in a manifest."""
    if twice := [key for key, n in Counter(u.id for u in utterances).items() if n > 1]:
        raise UserError(
            f"{merge_name}: {len(twice)} ids are in more than one of the merged splits, such as "
            f"{', '.join(twice[:EXAMPLES])}; rename them, or merge other splits"
        )


def write_manifests(save_folder, config, reports):
    """Write a manifest a split and the merged one, and remember of what they were made."""
    merge_lst, merge_name = config["merge"]
    contents = {f"{s}.csv": manifest_text(report.usable) for s, report in reports.items()}
    if merge_lst:
        merged = [u for split in merge_lst for u in reports[split].usable]
        check_merged(merged, merge_name)
        contents[merge_name] = manifest_text(merged)
    write_files(save_folder, contents)
    losses = [report.summary() for report in reports.values() if report.faults]
    remember(save_folder, config, contents, losses)
    logger.info("Wrote %s to %s", ", ".join(contents), save_folder)
