"""Whether the account and the service that a site names are this user's, where Slurm asks for them."""

from __future__ import annotations

import getpass
from dataclasses import dataclass

from launch import slurm
from launch.site import Site


@dataclass(frozen=True)
class Association:
    """What Slurm lets a user do in one account."""

    account: str
    qos: tuple[str, ...]
    most_jobs: int | None  # MaxSubmitJobs; None: no limit

    @classmethod
    def read(cls, line: str) -> Association:
        """From `account|qos,qos|limit` of sacctmgr."""
        account, qos, limit = line.split("|")
        return cls(account, tuple(filter(None, qos.split(","))), int(limit) if limit else None)


def associations() -> tuple[Association, ...] | None:
    """Those of this user; None where Slurm does not ask for any, and takes every account."""
    enforced = slurm.configuration().get("AccountingStorageEnforce", "none").split(",")
    if not {"associations", "limits", "qos", "safe"} & set(enforced):
        return None
    words = ("sacctmgr", "-nP", "show", "assoc", f"user={getpass.getuser()}", "format=account,qos,maxsubmit")
    return tuple(Association.read(line) for line in slurm.ask(*words).splitlines())


def faults(site: Site) -> list[str]:
    """What Slurm would refuse of cluster.account and cluster.qos."""
    held = associations()
    if held is None:
        return []
    mine = ", ".join(a.account for a in held) or "none"
    usable = [a for a in held if site.account in (None, a.account)]
    if not usable:
        name = site.account or "for you"
        return [f"cluster.account: there is no account {name}; yours are {mine}, see `sacctmgr show assoc user=$USER`"]
    services = dict.fromkeys(q for a in usable for q in a.qos)
    if site.qos and site.qos not in services:
        where = f"account {site.account}" if site.account else "you"
        return [f"cluster.qos: {site.qos} is not open to {where}; open are {', '.join(services) or 'none'}"]
    return []


def most_jobs(site: Site) -> int | None:
    """How many jobs the account may have queued; None: no limit is known."""
    limits = [a.most_jobs for a in associations() or () if site.account in (None, a.account)]
    return None if not limits or None in limits else max(n for n in limits if n is not None)
