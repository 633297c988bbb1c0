"""Old names of `prefs.job`, until every module has the new ones."""

from prefs.job import FAILED, FILE, FINISHED, RUNNING, Job, read_job, recorded  # noqa: F401
from prefs.job import JobCounts as Doings
from prefs.job import ModelUsage as Spent  # noqa: F401
from prefs.job import StageCounts as Work  # noqa: F401

Doings.did = Doings.add  # type: ignore[attr-defined]
