"""A SLURM of two nodes on this machine, as an ordinary user's processes: nothing is installed or left behind."""

from __future__ import annotations

import getpass
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Iterator, Sequence

from run_tools import ROOT

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "scancel", "scontrol")
OURS = ("SLURM_", "SBATCH_", "SUBMITIT_", "TORCHELASTIC_")  # of a job that these tests themselves run in
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={root}/ctld
SlurmctldPidFile={root}/ctld.pid
SlurmctldLogFile={root}/log/slurmctld
SlurmdSpoolDir={root}/spool.%n
SlurmdPidFile={root}/slurmd.%n.pid
SlurmdLogFile={root}/log/slurmd.%n
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=5
MinJobAge=3600
InactiveLimit=0
FirstJobId={first_job}
NodeName=127.0.0.1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=100000 State=UNKNOWN
NodeName=127.0.0.2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=100000 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
# There is no accounting database, and submitit asks it for a job's state.
SACCT = """\
#!/bin/sh
echo "JobID|State|NodeList"
exec squeue -h -r -t all -o '%i|%T|%N'
"""


class Cluster:
    """Two nodes, `127.0.0.1` and `127.0.0.2`, of partitions `low` (its jobs give way) and `high`.

    Attributes:
        environment: what a program needs in order to find it.

    Raises:
        RuntimeError: it does not start; with the daemons' logs.
    """

    def __init__(self, root: Path) -> None:
        self.root = root  # its path must be short: a socket's name has 108 characters at most
        for name in ("munge", "ctld", "spool.127.0.0.1", "spool.127.0.0.2", "log", "bin"):
            (root / name).mkdir()
        draw = random.Random()
        first_job = draw.randrange(1, 2**20)  # a port follows from the job's number, and another cluster may run beside this one
        host = socket.gethostname().partition(".")[0]
        text = CONFIGURATION.format(root=root, host=host, user=getpass.getuser(), ports=free_ports(3, draw), first_job=first_job)
        if socket.gethostbyname(host).startswith("127."):
            text += "CommunicationParameters=NoCtldInAddrAny,NoInAddrAny\n"
        (root / "slurm.conf").write_text(text)
        (root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (root / "bin/sacct").write_text(SACCT)
        (root / "bin/sacct").chmod(0o755)
        (root / "munge").chmod(0o755)
        (root / "munge/key").write_bytes(os.urandom(1024))
        (root / "munge/key").chmod(0o400)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
        paths = [str(root / "bin"), str(Path(sys.executable).parent), kept["PATH"], "/usr/sbin"]
        self.environment = {**kept, "PATH": os.pathsep.join(paths), "SLURM_CONF": str(root / "slurm.conf"), "OMP_NUM_THREADS": "1"}
        self.daemons = ExitStack()

    def __enter__(self) -> Cluster:
        munge = self.root / "munge"
        files = [f"--{name}={munge / name.partition('-')[0]}" for name in ("socket", "key-file", "pid-file", "log-file", "seed-file")]
        self._start("munged", "--foreground", "--force", *files)
        self._start("slurmctld", "-D")
        for node in ("127.0.0.1", "127.0.0.2"):
            self._start("slurmd", "-D", "-N", node)
        deadline = time.monotonic() + 60
        while len(set(self.ask("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False).split())) < 2:
            if time.monotonic() > deadline:
                logs = "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in self.root.glob("log/*"))
                self.daemons.close()
                raise RuntimeError(f"the SLURM of the tests does not start: {logs}")
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        self.ask("scancel", "--full", "--user", getpass.getuser(), check=False)
        self.daemons.close()
        shutil.rmtree(self.root, ignore_errors=True)

    def _start(self, *command: str) -> None:
        log = self.daemons.enter_context(open(self.root / f"log/{Path(command[0]).name}.out", "ab"))
        daemon = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        self.daemons.callback(daemon.wait)
        self.daemons.callback(daemon.terminate)

    def ask(self, *command: str, check: bool = True) -> str:
        """What one of SLURM's programs prints."""
        return subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, text=True, check=check, timeout=60).stdout

    def submit(self, *arguments: str) -> str:
        """sbatch, from the repository's root; the job's number."""
        return self.ask("sbatch", "--parsable", *arguments).strip()

    def facts(self, job: str) -> dict[str, str]:
        """What `scontrol show job` knows of it."""
        return dict(word.partition("=")[::2] for word in self.ask("scontrol", "show", "job", "-o", job).split())

    def numbered(self, name: str) -> str:
        """The number of the job of that name, once it is there."""
        deadline = time.monotonic() + 100
        while not (found := self.ask("squeue", "-h", "-t", "all", "-n", name, "-o", "%A").split()):
            assert time.monotonic() < deadline, f"there is no job {name}"
            time.sleep(0.3)
        return found[0]

    def restarted(self, jobs: Sequence[str], seconds: float = 150) -> Iterator[str]:
        """The jobs, each once it was put back into the queue."""
        deadline, waited_for = time.monotonic() + seconds, list(jobs)
        while waited_for:
            for job in list(waited_for):
                facts = self.facts(job)
                if facts["Restarts"] != "0":
                    waited_for.remove(job)
                    yield job
                assert time.monotonic() < deadline and (facts["Restarts"] != "0" or facts["JobState"] not in ENDED), facts
            time.sleep(0.3)

    def wait(self, job: str, seconds: float = 200) -> str:
        """The state in which a job has ended."""
        deadline = time.monotonic() + seconds
        while (state := self.facts(job)["JobState"]) not in ENDED:
            assert time.monotonic() < deadline, f"job {job} is still {state}"
            time.sleep(0.3)
        return state


def missing_programs() -> list[str]:
    """Those that are not installed; Debian has them in slurm-wlm and munge."""
    places = f"{os.environ['PATH']}{os.pathsep}/usr/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=places) is None]


def free_ports(count: int, draw: random.Random) -> list[int]:
    """Ports that nobody listens on, below those that the system hands out."""
    found: list[int] = []
    while len(found) < count:
        port = draw.randrange(10000, 20000)
        with socket.socket() as probe:
            if port not in found and probe.connect_ex(("127.0.0.1", port)) != 0:
                found.append(port)
    return found
