"""Which trainer a file is of, and the recipe that it becomes."""

from pathlib import Path

from cordee import yaml12
from cordee.errors import UserError
from cordee.importing import axolotl, llama_factory, torchtune, trl
from cordee.importing.draft import Draft

PEERS = (torchtune, axolotl, llama_factory, trl)
"""In this order: TRL's keys are in others' files too."""


def read(file: Path, processes: int = 1) -> Draft:
    """Make a draft of a recipe from a peer's file.

    Args:
        file: the YAML file.
        processes: how many processes the peer's training was started with, which no file tells.

    Raises:
        UserError: it can't be read, is no file of a peer, or trains by a method that is not here.
    """
    given = yaml12.read(file)
    peer = next((peer for peer in PEERS if peer.is_one(given)), None)
    if peer is None:
        known = "axolotl, LLaMA-Factory, TRL, alignment-handbook, torchtune"
        raise UserError("its keys are of no trainer that is known", file=file, hint=f"known: {known}")
    draft = Draft(file, peer.NAME, given)
    peer.translate(draft, processes)
    draft.settle(peer.TABLES)
    if not draft.data:
        raise UserError("names no data to train on", file=file)
    return draft
