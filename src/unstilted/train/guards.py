"""When training should stop, in words."""

from unstilted.recipe import TrainTable
from unstilted.records import HeldOut


def stop_reason(held_out: HeldOut, settings: TrainTable) -> str:
    """Why training should end here, in words, or nothing."""
    if held_out.margin >= settings.stop_margin:
        return f"held-out margin {held_out.margin:.2f} reached train.stop_margin {settings.stop_margin:g}"
    if held_out.chosen_logp_change <= -settings.stop_chosen_drop:
        lost = -held_out.chosen_logp_change
        return f"held-out chosen answers lost {lost:.1f} nats, train.stop_chosen_drop is {settings.stop_chosen_drop:g}"
    return ""
