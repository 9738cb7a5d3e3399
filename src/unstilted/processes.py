"""The processes that a launcher (`accelerate launch`, `torchrun`) started this program in, by what it wrote into the environment."""

import os


def n_processes() -> int:
    """How many run this program together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is; 0 is the main one."""
    return int(os.environ.get("RANK", "0"))


def is_follower() -> bool:
    """Whether this process only helps another, the main one, which alone talks to the user and touches the run folder."""
    return n_processes() > 1 and rank() > 0
