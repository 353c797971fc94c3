"""What every test shares."""

import os

# Tests run beside each other and beside what they start: one thread a process, or the threads
# wait for each other longer than they work. Set before torch is imported, and inherited.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items):
    """The longest first, or one process is left with it when the others have ended."""
    items.sort(key=lambda item: item.path.name != "test_soak.py")
