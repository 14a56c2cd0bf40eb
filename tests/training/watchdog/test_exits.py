"""The exit of a process whose loop hangs: what it still does, and that nothing delays it forever."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from reported_run import metric_rows, write_metrics

from wasteddp.errors import EXIT_FAILED
from wasteddp.training.run_folder import report_at_the_end
from wasteddp.training.watchdog import exits

pytestmark = pytest.mark.processes

# the loop hangs in the block, as in a collective; the watchdog's thread ends the process
HANGING = """
import sys, threading, time
from pathlib import Path
from wasteddp.training.run_folder import report_at_the_end
from wasteddp.training.watchdog import exits
run, is_main = Path(sys.argv[1]), sys.argv[2] == "0"
exits._LIMIT_S = float(sys.argv[3])
with report_at_the_end(run, print, is_main=is_main):
    threading.Timer(0.1, exits.leave_with_stacks, (70, run, int(sys.argv[2]))).start(); time.sleep(600)
"""

# the disk of the run hangs too: opening its log blocks
STUCK_DISK = """
import sys, time
from wasteddp.settings import Settings
from wasteddp.training.watchdog import watchdog
watchdog._BEAT_S, watchdog._DISK_S = 0.05, 0.2
watch, run = watchdog.Watchdog(), Settings().run.model_copy(update={"out": sys.argv[1], "timeout_s": 0.3})
watch.start(Settings().model_copy(update={"run": run}))
watch.at("computing")
time.sleep(600)
"""

# torch waits for the launcher's address, as when processes join
JOINING = """
import os, sys, time
from wasteddp.settings import Settings
from wasteddp.training.watchdog import exits
from wasteddp.training.watchdog import watchdog
from wasteddp.training.distributed.launcher import free_port
watchdog._STOPPED_S, watchdog._LAUNCHER_S = 0.1, 0.3
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RANK": "0", "WORLD_SIZE": "2"}
exits.STOP.signal_name, os.environ["TORCHELASTIC_USE_AGENT_STORE"], joined, stays_s = sys.argv[2:]
watch, run = watchdog.Watchdog.from_environment(), Settings().run.model_copy(update={"out": sys.argv[1]})
watch.start(Settings().model_copy(update={"run": run}))
if joined:
    watch.at("computing")
time.sleep(float(stays_s))
print("stayed")
"""


def hang(run: Path, rank: int, words_s: float = 30.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", HANGING, str(run), str(rank), str(words_s)]
    return forked.run(command, timeout=60)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    write_metrics(folder, metric_rows(10))
    (folder / "log.txt").touch()
    return folder


def test_a_run_that_hangs_leaves_its_report_and_the_stacks(run: Path) -> None:
    done = hang(run, rank=0)
    assert done.returncode == EXIT_FAILED, done.stderr
    assert f"report: {run}/report.html" in done.stdout
    assert f"report: {run}/report.html" in (run / "log.txt").read_text()
    assert "not finished" in (run / "report.html").read_text()
    last_line = HANGING.count("\n")
    assert f'File "<string>", line {last_line} in <module>' in (run / "failures" / "rank-00000.txt").read_text()


def test_only_rank_0_writes_it(run: Path) -> None:
    assert hang(run, rank=1).returncode == EXIT_FAILED
    assert (run / "failures" / "rank-00001.txt").exists()
    assert not (run / "report.html").exists()


def test_a_report_that_takes_too_long_does_not_hold_the_process(run: Path) -> None:
    done = hang(run, rank=0, words_s=0.01)
    assert done.returncode == EXIT_FAILED
    assert "report" not in done.stdout, "it left before"


def test_a_log_that_cannot_even_be_opened_does_not_hold_the_watchdog(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log.txt")  # opening it waits for a reader, as a file on a server that is gone waits
    done = forked.run([sys.executable, "-c", STUCK_DISK, str(tmp_path)], timeout=60)
    assert done.returncode == EXIT_FAILED
    assert "error: no progress: rank 0: step 0, computing for" in done.stderr


@pytest.mark.parametrize("error", [None, ValueError("a bug"), KeyboardInterrupt()])
def test_after_the_block_nothing_is_left_to_be_done(error: BaseException | None, run: Path) -> None:
    said: list[str] = []
    if error is None:
        with report_at_the_end(run, said.append, is_main=True):
            assert len(exits._acts) == 1
    else:
        with pytest.raises(type(error)), report_at_the_end(run, said.append, is_main=True):
            raise error
    assert not exits._acts
    assert bool(said) == (not isinstance(error, KeyboardInterrupt)), "a bug has its report; what is no error has none"


@pytest.mark.parametrize(
    ("asked", "launcher_keeps_it", "joined", "leaves"),
    [
        ("SIGTERM", "True", "", True),  # the kernel's signal when the launcher has ended
        ("SIGTERM", "", "", True),
        ("", "True", "", True),  # the launcher ended before this process had registered for that signal
        ("", "", "", False),  # rank 0 may be slow to start
        ("SIGTERM", "True", "joined", False),  # the loop does not need the store: it saves
    ],
)
def test_a_process_whose_launcher_is_gone_before_the_others_were_met_leaves(
    asked: str, launcher_keeps_it: str, joined: str, leaves: bool, tmp_path: Path
) -> None:
    stays_s = "50" if leaves else "1.2"  # far more than both limits
    command = [sys.executable, "-c", JOINING, str(tmp_path), asked, launcher_keeps_it, joined, stays_s]
    done = forked.run(command, timeout=60)
    assert done.returncode == (EXIT_FAILED if leaves else 0), done.stderr
    assert ("stayed" in done.stdout) == (not leaves)
    assert ("error: nobody answers at 127.0.0.1:" in done.stderr) == leaves
    assert ("and the process received SIGTERM" in done.stderr) == (leaves and bool(asked))


@pytest.mark.parametrize(("code", "said"), [(0, "closed\n"), (75, "closed\n"), (70, "")])
def test_an_end_waits_for_exit_handlers_and_for_no_thread(code: int, said: str) -> None:
    program = f"""
import atexit, threading, time
from wasteddp.training.watchdog.exits import leave
atexit.register(print, "closed")
threading.Thread(target=time.sleep, args=(600,)).start()
leave({code})
"""
    done = forked.run([sys.executable, "-c", program], timeout=60)
    assert (done.returncode, done.stdout) == (code, said)
