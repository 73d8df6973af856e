"""The documented name of `fastdpo.loss.objectives`."""

from .loss.objectives import Formula as Formula
from .loss.objectives import Objective as Objective
from .loss.objectives import apo_zero as apo_zero
from .loss.objectives import hinge as hinge
from .loss.objectives import ipo as ipo
from .loss.objectives import length_normalized_dpo as length_normalized_dpo
from .loss.objectives import lr_dpo as lr_dpo
from .loss.objectives import nca_pair as nca_pair
