"""A Slurm cluster of its own on this host: two nodes, a spare, accounting, preemption. Needs root.

    python tests/slurm/cluster.py         # starts one, prints how to use it, stops it on Ctrl-C

Each daemon lives in its own PID, mount and host-name namespace, so that killing a node's outermost
process takes its jobs along, as when a machine loses power. All sockets are on the loopback.
"""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

NODES = ("n1", "n2")
SPARE = "n3"  # not started
PROGRAMS = (
    *("munged", "munge", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd"),
    *("sbatch", "srun", "unshare", "setpriv"),
)
SECONDS_TO_START = 180

SLURM_CONF = """\
ClusterName=test
SlurmctldHost=ctl(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/state/slurmctld.pid
SlurmdPidFile={folder}/state/%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
AccountingStoragePass={folder}/munge.socket
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=0
KillWait=5
MinJobAge=3600
SlurmdTimeout=10
ReturnToService=2
NodeName=n[1-3] NodeAddr=127.0.0.1 Port=[{node_port}-{last_node_port}] CPUs=8 RealMemory=64000
PartitionName=low Nodes=n[1-3] Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=high Nodes=n[1-3] MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""

SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CommunicationParameters=NoInAddrAny
DbdHost=ctl
DbdAddr=127.0.0.1
DbdPort={dbd_port}
SlurmUser=root
PidFile={folder}/state/slurmdbd.pid
LogFile={folder}/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageUser=root
StorageLoc=slurm_acct
"""


def missing() -> str | None:
    """Why no cluster can be started here; None if one can."""
    if lacking := [name for name in PROGRAMS if shutil.which(name) is None]:
        return (
            f"Slurm is not installed ({lacking[0]} is missing): run tests/install_system.sh as root"
        )
    if os.geteuid() != 0:
        return "a Slurm cluster of its own needs root"
    if subprocess.run(["unshare", "--uts", "--mount", "--pid", "--fork", "true"]).returncode != 0:
        return "this container forbids namespaces (unshare), in which the nodes live"
    return None


class Cluster:
    """Partitions `low` (default; its jobs are preempted, 60 s of grace) and `high`."""

    def __init__(self) -> None:
        # not below pytest's folders: unix sockets want short paths
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for name in reversed(list(self._processes)):
            self._kill(name)
        shutil.rmtree(self.folder)

    def run(self, *command: str, check: bool = True) -> str:
        """What a Slurm command prints."""
        environment = os.environ | self.environment
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert not check or done.returncode == 0, f"{shlex.join(command)}: {done.stderr}"
        return done.stdout

    def kill_node(self, name: str) -> None:
        """Takes a node's power away: its daemon and all processes of its jobs."""
        self._kill(name)

    def start_node(self, name: str) -> None:
        self._box(name, name, f"slurmd -D -N {name}")

    def _start(self) -> None:
        folder = self.folder
        for name in ("state", "spool", "log", "db"):
            (folder / name).mkdir()
        ports = _free_ports(5)
        values = {
            "folder": folder,
            "port": ports,
            "dbd_port": ports + 1,
            "node_port": ports + 2,
            "last_node_port": ports + 4,
        }
        (folder / "slurm.conf").write_text(SLURM_CONF.format(**values))
        (folder / "slurmdbd.conf").write_text(SLURMDBD_CONF.format(**values))
        (folder / "slurmdbd.conf").chmod(0o600)
        (folder / "hosts").write_text(
            Path("/etc/hosts").read_text() + f"127.0.0.1 ctl {' '.join(NODES)} {SPARE}\n"
        )
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        self._daemon("munged", _munged(folder))
        store = ["--no-defaults", "--user=root", f"--datadir={folder}/db"]
        self._once("mariadb-install-db", *store, "--skip-test-db", "--skip-name-resolve")
        self.environment["MYSQL_UNIX_PORT"] = f"{folder}/mysql.socket"  # where slurmdbd looks
        self._daemon(
            "mariadbd",
            f"mariadbd {shlex.join(store)} --socket={folder}/mysql.socket --skip-networking "
            f"--pid-file={folder}/state/mariadbd.pid --innodb-flush-log-at-trx-commit=0",
        )
        self._until("munged", lambda: (folder / "munge.socket").is_socket())
        self._until("mariadbd", lambda: (folder / "mysql.socket").is_socket())
        self._box("slurmdbd", "ctl", "slurmdbd -D")
        self._until("slurmdbd", lambda: self._succeeds("sacctmgr -n show cluster"))
        self._box("slurmctld", "ctl", "slurmctld -D")
        self._until("slurmctld", lambda: self._succeeds("scontrol ping"))
        for node in NODES:
            self.start_node(node)
        self._until("nodes", self._idle)

    def _idle(self) -> bool:
        states = self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%T", check=False)
        return states.split().count("idle") == len(NODES)

    def _box(self, name: str, host: str, command: str) -> None:
        inside = f"hostname {host}; mount --bind {self.folder}/hosts /etc/hosts; {command} & wait"
        box = "unshare --uts --mount --pid --fork --kill-child --mount-proc sh -ec"
        self._daemon(name, f"{box} {shlex.quote(inside)}")

    def _daemon(self, name: str, command: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                # no daemon outlives this process, however it ends
                ["setpriv", "--pdeathsig", "KILL", *shlex.split(command)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | self.environment,
                start_new_session=True,
            )

    def _once(self, *command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(command)}: {done.stdout}\n{done.stderr}"

    def _succeeds(self, command: str) -> bool:
        environment = os.environ | self.environment
        return subprocess.run(command.split(), capture_output=True, env=environment).returncode == 0

    def _until(self, what: str, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS_TO_START
        while not reached():
            if time.monotonic() > deadline:
                logs = "\n".join(file.read_text() for file in (self.folder / "log").iterdir())
                raise RuntimeError(f"{what} did not come up:\n{logs}")
            time.sleep(0.1)

    def _kill(self, name: str) -> None:
        process = self._processes.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait()


def _munged(folder: Path) -> str:
    files = {
        "socket": folder / "munge.socket",
        "key-file": folder / "munge.key",
        "pid-file": folder / "state/munged.pid",
        "log-file": folder / "log/munged.log",
        "seed-file": folder / "state/munged.seed",
    }
    options = " ".join(f"--{option}={file}" for option, file in files.items())
    return f"munged --foreground --force {options}"


def _free_ports(count: int) -> int:
    """The first of `count` ports in a row that nothing listens on."""
    for first in range(17000, 30000, 10):
        with socket.socket() as probe:
            if all(probe.connect_ex(("127.0.0.1", first + i)) for i in range(count)):
                return first
    raise RuntimeError("no free ports")


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    with Cluster() as cluster:
        print(*(f"export {name}={value}" for name, value in cluster.environment.items()), sep="\n")
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
