"""Makes sure that all processes of a job do the same."""

from __future__ import annotations

from typing import Any

from yacs.config import CfgNode

from config import KEYS, PROCESS, ConfigError, lookup
from utils.runtime import distributed
from utils.runtime.provenance import program_digest, versions


def require_agreement(config: CfgNode, loaders: Any) -> None:
    """Make sure that all processes were given the same config, images and program; each would silently train something else.

    Raises:
        ConfigError: naming what differs, and on which rank.
    """
    if distributed.world_size() == 1:
        return
    sources = {"training images": loaders.train, "validation images": loaders.val}
    own = {f"{what} ({len(loader.dataset.source)})": loader.dataset.source.fingerprint() for what, loader in sources.items()}
    own |= {f"config key {key.name}": str(lookup(config, key.name)) for key in KEYS if key.scope != PROCESS}
    own |= {"class names": "\n".join(loaders.classes), "program": program_digest()}
    own |= {f"version of {name}": version for name, version in versions().items()}
    facts = distributed.gather_objects(own)
    for rank, theirs in enumerate(facts):
        for what in sorted(facts[0].keys() | theirs.keys()):
            if facts[0].get(what) != theirs.get(what):
                shown = " and ".join(str(fact.get(what, "another number"))[:80].replace("\n", ", ") for fact in (facts[0], theirs))
                raise ConfigError(f"rank {rank} does not have rank 0's {what} ({shown}); give every process the same command, "
                                  "the same files and the same installation")

