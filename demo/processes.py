"""Work shared out over processes: eSpeak has one state a process, so threads would not do."""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed


def map_in_processes(work, items, workers=None):
    """Yield (item, work(item)) as they get ready; by default a process for every CPU.

    With one worker all is done here. A failure, or giving up the iteration, ends the others.
    """
    workers = min(workers or os.cpu_count() or 1, len(items))
    if workers <= 1:
        yield from ((item, work(item)) for item in items)
        return
    context = multiprocessing.get_context("spawn")  # fork does not go together with threads
    pool = ProcessPoolExecutor(workers, context, _start)
    try:
        futures = {pool.submit(work, item): item for item in items}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start():
    os.environ["OMP_NUM_THREADS"] = "1"  # read by torch, which is loaded with the first work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends the pool
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    # A pool whose parent is killed waits for work forever.
    multiprocessing.parent_process().join()
    os._exit(1)
