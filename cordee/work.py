"""The two folders of a stage that is being worked on, and the files of its attempts."""

from dataclasses import dataclass
from pathlib import Path

from cordee import files
from cordee.errors import Fault


@dataclass(frozen=True)
class Work:
    """The two folders of a stage that is being worked on."""

    out: Path
    """`<stage>@<n>.partial`: becomes the artifact."""
    logs: Path
    """`logs/<stage>@<n>`: log, events, job and result."""

    @property
    def job(self) -> Path:
        """What the stage's process reads."""
        return self.logs / "job.json"

    @property
    def events(self) -> Path:
        """What its processes report while they run."""
        return self.logs / "events.jsonl"

    @property
    def log(self) -> Path:
        """Standard output and error of its processes."""
        return self.logs / "log.txt"

    @property
    def stop(self) -> Path:
        """Exists when the stage was asked to stop."""
        return self.logs / "stop"

    @property
    def save(self) -> Path:
        """Exists when the stage was asked for a resume point; the stage removes it once there is one."""
        return self.logs / "save"

    @property
    def result(self) -> Path:
        """What the stage returned."""
        return self.logs / "result.json"

    @property
    def version(self) -> int:
        """The artifact's number."""
        return int(self.logs.name.rpartition("@")[2])

    @property
    def stage(self) -> str:
        """The stage's name."""
        return self.logs.name.rpartition("@")[0]

    @property
    def fingerprint(self) -> str | None:
        """Of the attempt that was begun here and not published; None if there is none that could be continued."""
        try:
            job = files.read_json(self.job) if self.out.is_dir() else None
        except Fault:
            return None
        found = job.get("fingerprint") if isinstance(job, dict) else None
        return found if isinstance(found, str) else None

    def has_files(self) -> bool:
        """Whether an attempt has left a file."""
        return any(not path.is_dir() for path in self.out.rglob("*"))
