"""Old places of names, until every module has the new ones."""

from prefs.results.distribution import distribution_table  # noqa: F401
from prefs.results.judges import judges_table  # noqa: F401
from prefs.results.refusals import refusal_table, refusals  # noqa: F401
from prefs.results.stability import Stability, stability, stability_table  # noqa: F401
from prefs.results.tables import by_origin, columns, numeric  # noqa: F401
from prefs.statistics.groups import Group, groups_by_origin  # noqa: F401
