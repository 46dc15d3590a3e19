"""The configuration: what a user may write in a YAML file. Its classes and readers are imported from here; components,
references and a user's code from their modules."""

from rayexp.config.compare import CompareConfig as CompareConfig
from rayexp.config.components import IMAGE_DATA as IMAGE_DATA
from rayexp.config.components import TEXT_DATA as TEXT_DATA
from rayexp.config.experiment import UNDECIDED as UNDECIDED
from rayexp.config.experiment import AugmentConfig as AugmentConfig
from rayexp.config.experiment import CheckpointConfig as CheckpointConfig
from rayexp.config.experiment import DataConfig as DataConfig
from rayexp.config.experiment import ExperimentConfig as ExperimentConfig
from rayexp.config.experiment import OptimizerConfig as OptimizerConfig
from rayexp.config.experiment import ScaleConfig as ScaleConfig
from rayexp.config.experiment import ScheduleConfig as ScheduleConfig
from rayexp.config.fields import explain as explain
from rayexp.config.loading import blame_words as blame_words
from rayexp.config.loading import load as load
from rayexp.config.loading import parse as parse
from rayexp.config.loading import passed_over as passed_over
from rayexp.config.loading import read as read
from rayexp.config.loading import refuse_contradictions as refuse_contradictions
from rayexp.config.model import ModelConfig as ModelConfig
from rayexp.config.section import Section as Section
from rayexp.config.shipped import find_config as find_config
from rayexp.config.shipped import headline as headline
from rayexp.config.shipped import is_grid as is_grid
from rayexp.config.shipped import shipped as shipped
from rayexp.config.shipped import shipped_configs as shipped_configs
