# SPDX-License-Identifier: Apache-2.0
# written by tools/face.py: the types of the public names, for editors and type checkers

from enum import Enum

from graft.combine.intruders import reduce_intruder_dimension as reduce_intruder_dimension
from graft.config.base import PeftConfig as PeftConfig
from graft.config.base import TaskType as TaskType
from graft.config.prompt import PromptLearningConfig as PromptLearningConfig
from graft.core.errors import AdapterKeyError as AdapterKeyError
from graft.core.errors import AdapterNameError as AdapterNameError
from graft.core.errors import AdapterNotFoundError as AdapterNotFoundError
from graft.core.errors import AlreadyInjectedError as AlreadyInjectedError
from graft.core.errors import BaseModelMismatchError as BaseModelMismatchError
from graft.core.errors import CalibrationError as CalibrationError
from graft.core.errors import CheckpointError as CheckpointError
from graft.core.errors import ConfigError as ConfigError
from graft.core.errors import ConfigTypeError as ConfigTypeError
from graft.core.errors import DistributedError as DistributedError
from graft.core.errors import FolderInUseError as FolderInUseError
from graft.core.errors import HubError as HubError
from graft.core.errors import InUseError as InUseError
from graft.core.errors import LossError as LossError
from graft.core.errors import NoMatchingPeftModuleError as NoMatchingPeftModuleError
from graft.core.errors import NonFiniteError as NonFiniteError
from graft.core.errors import PeftError as PeftError
from graft.core.errors import PeftWarning as PeftWarning
from graft.core.errors import RoutingError as RoutingError
from graft.core.errors import ServerError as ServerError
from graft.core.errors import ServerTimeoutError as ServerTimeoutError
from graft.core.errors import UnknownModelError as UnknownModelError
from graft.core.errors import UnsupportedLayerError as UnsupportedLayerError
from graft.core.layer import AdapterLayer as AdapterLayer
from graft.core.method import Method as Method
from graft.files.load import load_adapter as load_adapter
from graft.files.merging.merge import merge_files as merge_files
from graft.inject.beside import ModulesToSaveWrapper as ModulesToSaveWrapper
from graft.inject.report import InjectReport as InjectReport
from graft.io.base import get_base_model_state_dict as get_base_model_state_dict
from graft.io.base import set_base_model_state_dict as set_base_model_state_dict
from graft.io.compose import compose_cartridge_adapters as compose_cartridge_adapters
from graft.io.compose import join_stages as join_stages
from graft.io.files import load_peft_weights as load_peft_weights
from graft.io.load import LoadReport as LoadReport
from graft.io.load import set_peft_model_state_dict as set_peft_model_state_dict
from graft.io.save import get_peft_model_state_dict as get_peft_model_state_dict
from graft.many.runs import MultiTrain as MultiTrain
from graft.many.sweep import sweep as sweep
from graft.methods import method_of as method_of
from graft.methods.adalora.adalora import AdaLoraConfig as AdaLoraConfig
from graft.methods.adamss import AdamssConfig as AdamssConfig
from graft.methods.adaption_prompt import AdaptionPromptConfig as AdaptionPromptConfig
from graft.methods.beft import BeftConfig as BeftConfig
from graft.methods.boft import BOFTConfig as BOFTConfig
from graft.methods.bottleneck import BottleneckConfig as BottleneckConfig
from graft.methods.c3a import C3AConfig as C3AConfig
from graft.methods.deft import DeftConfig as DeftConfig
from graft.methods.delora import DeloraConfig as DeloraConfig
from graft.methods.ewora import EworaConfig as EworaConfig
from graft.methods.finegates import FineGatesConfig as FineGatesConfig
from graft.methods.fourierft import FourierFTConfig as FourierFTConfig
from graft.methods.frod import FrodConfig as FrodConfig
from graft.methods.fusion import AdapterFusionConfig as AdapterFusionConfig
from graft.methods.glora import GloraConfig as GloraConfig
from graft.methods.gralora import GraloraConfig as GraloraConfig
from graft.methods.hira import HiraConfig as HiraConfig
from graft.methods.hra import HRAConfig as HRAConfig
from graft.methods.ia3 import IA3Config as IA3Config
from graft.methods.lily import LilyConfig as LilyConfig
from graft.methods.ln_tuning import LNTuningConfig as LNTuningConfig
from graft.methods.loha import LoHaConfig as LoHaConfig
from graft.methods.lokr import LoKrConfig as LoKrConfig
from graft.methods.lora.config import LoraConfig as LoraConfig
from graft.methods.lora.config import LoraRuntimeConfig as LoraRuntimeConfig
from graft.methods.lora.dora import DoraCaching as DoraCaching
from graft.methods.lora.sub_configs import ArrowConfig as ArrowConfig
from graft.methods.lora.sub_configs import BdLoraConfig as BdLoraConfig
from graft.methods.lora.sub_configs import CordaConfig as CordaConfig
from graft.methods.lora.sub_configs import EvaConfig as EvaConfig
from graft.methods.lora.sub_configs import KasaConfig as KasaConfig
from graft.methods.lora.sub_configs import LoftQConfig as LoftQConfig
from graft.methods.lora.sub_configs import LoraGAConfig as LoraGAConfig
from graft.methods.lora.sub_configs import MontecloraConfig as MontecloraConfig
from graft.methods.lora.sub_configs import VeloraConfig as VeloraConfig
from graft.methods.loraxs import LoraXsConfig as LoraXsConfig
from graft.methods.miss import MissConfig as MissConfig
from graft.methods.mixlora import MixLoraConfig as MixLoraConfig
from graft.methods.moelora import MoeLoraConfig as MoeLoraConfig
from graft.methods.mtllora import MtlLoraConfig as MtlLoraConfig
from graft.methods.oft import OFTConfig as OFTConfig
from graft.methods.osf import OSFConfig as OSFConfig
from graft.methods.peanut import PeanutConfig as PeanutConfig
from graft.methods.poly import PolyConfig as PolyConfig
from graft.methods.psoft import PsoftConfig as PsoftConfig
from graft.methods.pvera import PveraConfig as PveraConfig
from graft.methods.randlora import RandLoraConfig as RandLoraConfig
from graft.methods.reft import ReftConfig as ReftConfig
from graft.methods.road import RoadConfig as RoadConfig
from graft.methods.sdt import SdtConfig as SdtConfig
from graft.methods.shadow.network import ShadowConfig as ShadowConfig
from graft.methods.shira import ShiraConfig as ShiraConfig
from graft.methods.steering import SteeringConfig as SteeringConfig
from graft.methods.supertuning import SupertuningConfig as SupertuningConfig
from graft.methods.svft import SvftConfig as SvftConfig
from graft.methods.tinylora import TinyLoraConfig as TinyLoraConfig
from graft.methods.tlora import TLoraConfig as TLoraConfig
from graft.methods.trainable_tokens import TrainableTokensConfig as TrainableTokensConfig
from graft.methods.unilora import UniLoraConfig as UniLoraConfig
from graft.methods.vblora import VBLoRAConfig as VBLoRAConfig
from graft.methods.vera import VeraConfig as VeraConfig
from graft.methods.waveft import WaveFTConfig as WaveFTConfig
from graft.methods.xlora import XLoraConfig as XLoraConfig
from graft.model.adapter_tensors import AdapterTensors as AdapterTensors
from graft.model.adapter_tensors import adapter_tensors as adapter_tensors
from graft.model.api import PEFT_TYPE_TO_CONFIG_MAPPING as PEFT_TYPE_TO_CONFIG_MAPPING
from graft.model.api import PEFT_TYPE_TO_PREFIX_MAPPING as PEFT_TYPE_TO_PREFIX_MAPPING
from graft.model.api import PEFT_TYPE_TO_TUNER_MAPPING as PEFT_TYPE_TO_TUNER_MAPPING
from graft.model.api import get_peft_config as get_peft_config
from graft.model.api import get_peft_model as get_peft_model
from graft.model.api import plan as plan
from graft.model.audit import AuditReport as AuditReport
from graft.model.audit import audit as audit
from graft.model.compose import Average as Average
from graft.model.compose import Parallel as Parallel
from graft.model.compose import Stack as Stack
from graft.model.compose import split as split
from graft.model.convert import convert_to_lora as convert_to_lora
from graft.model.convert import save_as_lora as save_as_lora
from graft.model.convert import truncate_lora as truncate_lora
from graft.model.experts import XLoraTuner as XLoraTuner
from graft.model.experts import create_arrow_model as create_arrow_model
from graft.model.functional import calling as calling
from graft.model.merging import merge_report as merge_report
from graft.model.mixed import PeftMixedModel as PeftMixedModel
from graft.model.peft_model import PeftModel as PeftModel
from graft.model.prompts import initialize_kv_prefix_from_past_key_values as initialize_kv_prefix_from_past_key_values
from graft.model.prompts import initialize_kv_prefix_from_text as initialize_kv_prefix_from_text
from graft.model.prompts import prompt_embeddings_from_past_key_values as prompt_embeddings_from_past_key_values
from graft.model.rates import suggest_lr as suggest_lr
from graft.model.status import get_layer_status as get_layer_status
from graft.model.status import get_model_status as get_model_status
from graft.model.tasks import AutoPeftModel as AutoPeftModel
from graft.model.tasks import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
from graft.model.tasks import AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction
from graft.model.tasks import AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering
from graft.model.tasks import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
from graft.model.tasks import AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification
from graft.model.tasks import AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification
from graft.model.tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING as MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from graft.model.tasks import PeftModelForCausalLM as PeftModelForCausalLM
from graft.model.tasks import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
from graft.model.tasks import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
from graft.model.tasks import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
from graft.model.tasks import PeftModelForSequenceClassification as PeftModelForSequenceClassification
from graft.model.tasks import PeftModelForTokenClassification as PeftModelForTokenClassification
from graft.model.tuner import Tuner as Tuner
from graft.model.tuner import inject_adapter_in_model as inject_adapter_in_model
from graft.prompts.base import shift_tokens_right as shift_tokens_right
from graft.prompts.cartridge import CartridgeConfig as CartridgeConfig
from graft.prompts.cartridge import CartridgeEncoder as CartridgeEncoder
from graft.prompts.cpt import CPTConfig as CPTConfig
from graft.prompts.cpt import CPTEmbedding as CPTEmbedding
from graft.prompts.multitask_prompt_tuning import MultitaskPromptEmbedding as MultitaskPromptEmbedding
from graft.prompts.multitask_prompt_tuning import MultitaskPromptTuningConfig as MultitaskPromptTuningConfig
from graft.prompts.multitask_prompt_tuning import MultitaskPromptTuningInit as MultitaskPromptTuningInit
from graft.prompts.p_tuning import PromptEncoder as PromptEncoder
from graft.prompts.p_tuning import PromptEncoderConfig as PromptEncoderConfig
from graft.prompts.p_tuning import PromptEncoderReparameterizationType as PromptEncoderReparameterizationType
from graft.prompts.prefix_tuning import PrefixEncoder as PrefixEncoder
from graft.prompts.prefix_tuning import PrefixTuningConfig as PrefixTuningConfig
from graft.prompts.prompt_tuning import PromptEmbedding as PromptEmbedding
from graft.prompts.prompt_tuning import PromptTuningConfig as PromptTuningConfig
from graft.prompts.prompt_tuning import PromptTuningInit as PromptTuningInit
from graft.serving.hotswap import hotswap_adapter as hotswap_adapter
from graft.serving.hotswap import hotswap_adapter_from_state_dict as hotswap_adapter_from_state_dict
from graft.serving.hotswap import prepare_model_for_compiled_hotswap as prepare_model_for_compiled_hotswap
from graft.train.calibration import preprocess_corda as preprocess_corda
from graft.train.calibration import preprocess_loraga as preprocess_loraga
from graft.train.calibration import preprocess_lorasb as preprocess_lorasb
from graft.train.calibration import preprocess_sdt as preprocess_sdt
from graft.train.eva import get_eva_state_dict as get_eva_state_dict
from graft.train.eva import initialize_lora_eva_weights as initialize_lora_eva_weights
from graft.train.helpers import cast_mixed_precision_params as cast_mixed_precision_params
from graft.train.helpers import prepare_model_for_kbit_training as prepare_model_for_kbit_training
from graft.train.kappa import KappaTuneSelector as KappaTuneSelector
from graft.train.kappa import find_kappa_target_modules as find_kappa_target_modules
from graft.train.loftq import replace_lora_weights_loftq as replace_lora_weights_loftq
from graft.train.resuming import Resumed as Resumed
from graft.train.resuming import resume as resume
from graft.train.resuming import save_training as save_training
from graft.train.steering import set_steering_vectors as set_steering_vectors

__version__: str

class PeftType(str, Enum):
    LORA = "LORA"
    ADALORA = "ADALORA"
    IA3 = "IA3"
    VERA = "VERA"
    PVERA = "PVERA"
    LOHA = "LOHA"
    OFT = "OFT"
    HRA = "HRA"
    HIRA = "HIRA"
    MISS = "MISS"
    VBLORA = "VBLORA"
    GRALORA = "GRALORA"
    DELORA = "DELORA"
    C3A = "C3A"
    FOURIERFT = "FOURIERFT"
    WAVEFT = "WAVEFT"
    LOKR = "LOKR"
    ROAD = "ROAD"
    RANDLORA = "RANDLORA"
    UNILORA = "UNILORA"
    TINYLORA = "TINYLORA"
    GLORA = "GLORA"
    PEANUT = "PEANUT"
    LILY = "LILY"
    SHADOW = "SHADOW"
    ADAMSS = "ADAMSS"
    FROD = "FROD"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    BEFT = "BEFT"
    SHIRA = "SHIRA"
    SUPERTUNING = "SUPERTUNING"
    DEFT = "DEFT"
    BOFT = "BOFT"
    PSOFT = "PSOFT"
    OSF = "OSF"
    LN_TUNING = "LN_TUNING"
    POLY = "POLY"
    XLORA = "XLORA"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    LORAXS = "LORAXS"
    FINEGATES = "FINEGATES"
    SVFT = "SVFT"
    MTLLORA = "MTLLORA"
    TLORA = "TLORA"
    BOTTLENECK = "BOTTLENECK"
    ADAPTER_FUSION = "ADAPTER_FUSION"
    REFT = "REFT"
    SDT = "SDT"
    STEERING = "STEERING"
    EWORA = "EWORA"
    MOELORA = "MOELORA"
    MIXLORA = "MIXLORA"
    PROMPT_TUNING = "PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    CPT = "CPT"
    CARTRIDGE = "CARTRIDGE"

class LoraModel(Tuner): ...
class AdaLoraModel(Tuner): ...
class IA3Model(Tuner): ...
class VeraModel(Tuner): ...
class PveraModel(Tuner): ...
class LoHaModel(Tuner): ...
class OFTModel(Tuner): ...
class HRAModel(Tuner): ...
class HiraModel(Tuner): ...
class MissModel(Tuner): ...
class VBLoRAModel(Tuner): ...
class GraloraModel(Tuner): ...
class DeloraModel(Tuner): ...
class C3AModel(Tuner): ...
class FourierFTModel(Tuner): ...
class WaveFTModel(Tuner): ...
class LoKrModel(Tuner): ...
class RoadModel(Tuner): ...
class RandLoraModel(Tuner): ...
class UniLoraModel(Tuner): ...
class TinyLoraModel(Tuner): ...
class GloraModel(Tuner): ...
class PeanutModel(Tuner): ...
class LilyModel(Tuner): ...
class ShadowModel(Tuner): ...
class AdamssModel(Tuner): ...
class FrodModel(Tuner): ...
class TrainableTokensModel(Tuner): ...
class BeftModel(Tuner): ...
class ShiraModel(Tuner): ...
class SupertuningModel(Tuner): ...
class DeftModel(Tuner): ...
class BOFTModel(Tuner): ...
class PsoftModel(Tuner): ...
class OSFModel(Tuner): ...
class LNTuningModel(Tuner): ...
class PolyModel(Tuner): ...
class XLoraModel(XLoraTuner): ...
class AdaptionPromptModel(Tuner): ...
class LoraXsModel(Tuner): ...
class FineGatesModel(Tuner): ...
class SvftModel(Tuner): ...
class MtlLoraModel(Tuner): ...
class TLoraModel(Tuner): ...
class BottleneckModel(Tuner): ...
class AdapterFusionModel(Tuner): ...
class ReftModel(Tuner): ...
class SdtModel(Tuner): ...
class SteeringModel(Tuner): ...
class EworaModel(Tuner): ...
class MoeLoraModel(Tuner): ...
class MixLoraModel(Tuner): ...

__all__ = [
    "__version__",
    "AdaLoraConfig",
    "AdaLoraModel",
    "AdamssConfig",
    "AdamssModel",
    "AdapterFusionConfig",
    "AdapterFusionModel",
    "AdapterKeyError",
    "AdapterLayer",
    "AdapterNameError",
    "AdapterNotFoundError",
    "AdapterTensors",
    "AdaptionPromptConfig",
    "AdaptionPromptModel",
    "AlreadyInjectedError",
    "ArrowConfig",
    "AuditReport",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "Average",
    "BOFTConfig",
    "BOFTModel",
    "BaseModelMismatchError",
    "BdLoraConfig",
    "BeftConfig",
    "BeftModel",
    "BottleneckConfig",
    "BottleneckModel",
    "C3AConfig",
    "C3AModel",
    "CPTConfig",
    "CPTEmbedding",
    "CalibrationError",
    "CartridgeConfig",
    "CartridgeEncoder",
    "CheckpointError",
    "ConfigError",
    "ConfigTypeError",
    "CordaConfig",
    "DeftConfig",
    "DeftModel",
    "DeloraConfig",
    "DeloraModel",
    "DistributedError",
    "DoraCaching",
    "EvaConfig",
    "EworaConfig",
    "EworaModel",
    "FineGatesConfig",
    "FineGatesModel",
    "FolderInUseError",
    "FourierFTConfig",
    "FourierFTModel",
    "FrodConfig",
    "FrodModel",
    "GloraConfig",
    "GloraModel",
    "GraloraConfig",
    "GraloraModel",
    "HRAConfig",
    "HRAModel",
    "HiraConfig",
    "HiraModel",
    "HubError",
    "IA3Config",
    "IA3Model",
    "InUseError",
    "InjectReport",
    "KappaTuneSelector",
    "KasaConfig",
    "LNTuningConfig",
    "LNTuningModel",
    "LilyConfig",
    "LilyModel",
    "LoHaConfig",
    "LoHaModel",
    "LoKrConfig",
    "LoKrModel",
    "LoadReport",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "LoraXsConfig",
    "LoraXsModel",
    "LossError",
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "Method",
    "MissConfig",
    "MissModel",
    "MixLoraConfig",
    "MixLoraModel",
    "ModulesToSaveWrapper",
    "MoeLoraConfig",
    "MoeLoraModel",
    "MontecloraConfig",
    "MtlLoraConfig",
    "MtlLoraModel",
    "MultiTrain",
    "MultitaskPromptEmbedding",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "NoMatchingPeftModuleError",
    "NonFiniteError",
    "OFTConfig",
    "OFTModel",
    "OSFConfig",
    "OSFModel",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "Parallel",
    "PeanutConfig",
    "PeanutModel",
    "PeftConfig",
    "PeftError",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PeftWarning",
    "PolyConfig",
    "PolyModel",
    "PrefixEncoder",
    "PrefixTuningConfig",
    "PromptEmbedding",
    "PromptEncoder",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "PromptTuningInit",
    "PsoftConfig",
    "PsoftModel",
    "PveraConfig",
    "PveraModel",
    "RandLoraConfig",
    "RandLoraModel",
    "ReftConfig",
    "ReftModel",
    "Resumed",
    "RoadConfig",
    "RoadModel",
    "RoutingError",
    "SdtConfig",
    "SdtModel",
    "ServerError",
    "ServerTimeoutError",
    "ShadowConfig",
    "ShadowModel",
    "ShiraConfig",
    "ShiraModel",
    "Stack",
    "SteeringConfig",
    "SteeringModel",
    "SupertuningConfig",
    "SupertuningModel",
    "SvftConfig",
    "SvftModel",
    "TLoraConfig",
    "TLoraModel",
    "TaskType",
    "TinyLoraConfig",
    "TinyLoraModel",
    "TrainableTokensConfig",
    "TrainableTokensModel",
    "Tuner",
    "UniLoraConfig",
    "UniLoraModel",
    "UnknownModelError",
    "UnsupportedLayerError",
    "VBLoRAConfig",
    "VBLoRAModel",
    "VeloraConfig",
    "VeraConfig",
    "VeraModel",
    "WaveFTConfig",
    "WaveFTModel",
    "XLoraConfig",
    "XLoraModel",
    "adapter_tensors",
    "audit",
    "calling",
    "cast_mixed_precision_params",
    "compose_cartridge_adapters",
    "convert_to_lora",
    "create_arrow_model",
    "find_kappa_target_modules",
    "get_base_model_state_dict",
    "get_eva_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "initialize_kv_prefix_from_past_key_values",
    "initialize_kv_prefix_from_text",
    "initialize_lora_eva_weights",
    "inject_adapter_in_model",
    "join_stages",
    "load_adapter",
    "load_peft_weights",
    "merge_files",
    "merge_report",
    "method_of",
    "plan",
    "prepare_model_for_compiled_hotswap",
    "prepare_model_for_kbit_training",
    "preprocess_corda",
    "preprocess_loraga",
    "preprocess_lorasb",
    "preprocess_sdt",
    "prompt_embeddings_from_past_key_values",
    "reduce_intruder_dimension",
    "replace_lora_weights_loftq",
    "resume",
    "save_as_lora",
    "save_training",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "set_steering_vectors",
    "shift_tokens_right",
    "split",
    "suggest_lr",
    "sweep",
    "truncate_lora",
]
