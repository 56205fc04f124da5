"""What a checkpoint of a method says besides Lightning's own, and which ones it takes."""

from typing import Any

from solo.methods.base import BaseMethod
from torch import Tensor

from emp_plugin.errors import UserError
from emp_plugin.solo_learn import API

# what 1.0.2 calls a method's modules, and 1.0.6
NAMES_OF_1_0_6 = {"encoder": "backbone", "momentum_encoder": "momentum_backbone"}
NAMES_OF_1_0_2 = {new: old for old, new in NAMES_OF_1_0_6.items()}
WRITTEN_BY = "solo_learn_generation"  # the key in a checkpoint
FORMER_NAMES = {"wheel": "1.0.2", "head": "1.0.6"}  # what older checkpoints have there
CORRECTIONS = "emp_plugin_corrections"  # the key in a checkpoint; older ones lack it


class Exchanged(BaseMethod):
    """Checkpoints call the backbone what 1.0.6 calls it, whoever writes them; either name is read.

    The ``main_linear.py`` of 1.0.6 takes the weights called ``backbone``. If there are none it
    starts from random ones without a word. Only weights are exchanged. The optimisers' states
    differ, so a run is continued under the version that began it.

    Raises:
        UserError: when a run is to be continued under another version, or with other corrections.
    """

    corrections: tuple[str, ...] = ()  # those that change a training's numbers

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["state_dict"] = _rename(checkpoint["state_dict"], NAMES_OF_1_0_6)
        checkpoint[WRITTEN_BY] = API
        checkpoint[CORRECTIONS] = sorted(self.corrections)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        try:
            continued = self.trainer.state.fn == "fit"
        except RuntimeError:  # load_from_checkpoint: there is no trainer
            continued = False
        writer, ours = checkpoint.get(WRITTEN_BY, API), sorted(self.corrections)
        writer, theirs = FORMER_NAMES.get(writer, writer), checkpoint.get(CORRECTIONS, ours)
        if continued and (writer, theirs) != (API, ours):
            there, here = (", ".join(names) or "none" for names in (theirs, ours))
            raise UserError(
                f"this checkpoint was written under solo-learn {writer} (corrections: {there}), "
                f"and this is {API} (corrections: {here}): it can be evaluated here, but its "
                "training only continues there. Start another run with auto_resume.enabled=False"
            )

    def load_state_dict(self, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any):
        here = NAMES_OF_1_0_6 if API == "1.0.6" else NAMES_OF_1_0_2
        return super().load_state_dict(_rename(state_dict, here), *args, **kwargs)


def _rename(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """The state with other names for some of the method's modules."""
    parts = ((key.partition("."), value) for key, value in state.items())
    return {names.get(module, module) + dot + rest: value for (module, dot, rest), value in parts}
