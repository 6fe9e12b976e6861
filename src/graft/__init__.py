# SPDX-License-Identifier: Apache-2.0
"""graft: parameter-efficient adapters for pretrained PyTorch models, with PEFT's API and checkpoints.

Public names are imported when they are first used; `import graft` itself imports not even torch.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from graft.methods import ROWS

__version__ = "0.1.0"

_NAMES: dict[str, str] = {
    name: module
    for module, names in {
        "graft.core.errors": "AdapterKeyError AdapterNameError AdapterNotFoundError AlreadyInjectedError "
        "BaseModelMismatchError CalibrationError CheckpointError ConfigError ConfigTypeError DistributedError "
        "FolderInUseError HubError InUseError LossError NoMatchingPeftModuleError NonFiniteError PeftError PeftWarning "
        "RoutingError ServerError ServerTimeoutError UnknownModelError UnsupportedLayerError",
        "graft.core.layer": "AdapterLayer",
        "graft.core.method": "Method",
        "graft.config.base": "PeftConfig TaskType",
        "graft.methods": "PeftType method_of",
        "graft.methods.lora.config": "LoraRuntimeConfig",
        "graft.methods.lora.sub_configs": "ArrowConfig BdLoraConfig CordaConfig EvaConfig KasaConfig LoftQConfig "
        "LoraGAConfig MontecloraConfig VeloraConfig",
        "graft.methods.lora.dora": "DoraCaching",
        "graft.combine.intruders": "reduce_intruder_dimension",
        "graft.prompts.prompt_tuning": "PromptTuningInit",
        "graft.prompts.base": "shift_tokens_right",
        "graft.prompts.p_tuning": "PromptEncoderReparameterizationType",
        "graft.prompts.multitask_prompt_tuning": "MultitaskPromptTuningInit",
        "graft.config.prompt": "PromptLearningConfig",
        "graft.inject.report": "InjectReport",
        "graft.inject.beside": "ModulesToSaveWrapper",
        "graft.model.functional": "calling",
        "graft.model.api": "PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING PEFT_TYPE_TO_TUNER_MAPPING "
        "get_peft_config get_peft_model plan",
        "graft.model.tuner": "Tuner inject_adapter_in_model",
        "graft.model.mixed": "PeftMixedModel",
        "graft.model.compose": "Average Parallel Stack split",
        "graft.model.experts": "create_arrow_model",
        "graft.model.adapter_tensors": "AdapterTensors adapter_tensors",
        "graft.model.merging": "merge_report",
        "graft.model.convert": "convert_to_lora save_as_lora truncate_lora",
        "graft.files.load": "load_adapter",
        "graft.files.merging.merge": "merge_files",
        "graft.model.audit": "AuditReport audit",
        "graft.model.rates": "suggest_lr",
        "graft.model.tasks": "MODEL_TYPE_TO_PEFT_MODEL_MAPPING PeftModel PeftModelForCausalLM "
        "PeftModelForFeatureExtraction PeftModelForQuestionAnswering PeftModelForSeq2SeqLM "
        "PeftModelForSequenceClassification PeftModelForTokenClassification "
        "AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction "
        "AutoPeftModelForQuestionAnswering AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification "
        "AutoPeftModelForTokenClassification",
        "graft.model.status": "get_layer_status get_model_status",
        "graft.model.prompts": "initialize_kv_prefix_from_past_key_values initialize_kv_prefix_from_text "
        "prompt_embeddings_from_past_key_values",
        "graft.io.compose": "compose_cartridge_adapters join_stages",
        "graft.io.base": "get_base_model_state_dict set_base_model_state_dict",
        "graft.io.files": "load_peft_weights",
        "graft.io.load": "LoadReport set_peft_model_state_dict",
        "graft.io.save": "get_peft_model_state_dict",
        "graft.serving.hotswap": "hotswap_adapter hotswap_adapter_from_state_dict prepare_model_for_compiled_hotswap",
        "graft.train.calibration": "preprocess_corda preprocess_loraga preprocess_lorasb preprocess_sdt",
        "graft.train.steering": "set_steering_vectors",
        "graft.train.eva": "get_eva_state_dict initialize_lora_eva_weights",
        "graft.train.loftq": "replace_lora_weights_loftq",
        "graft.train.helpers": "cast_mixed_precision_params prepare_model_for_kbit_training",
        "graft.many.runs": "MultiTrain",
        "graft.train.resuming": "Resumed resume save_training",
        "graft.many.sweep": "sweep",
        "graft.train.kappa": "KappaTuneSelector find_kappa_target_modules",
    }.items()
    for name in names.split()
}
_CONFIGS = {row.config: peft_type for peft_type, row in ROWS.items()}
_TUNERS = {row.tuner: peft_type for peft_type, row in ROWS.items()}

__all__ = ["__version__", *sorted((*_NAMES, *_CONFIGS, *_TUNERS))]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, store it in this module, and return it.

    Raises AttributeError for other names.
    """
    if name in _NAMES:
        value = getattr(import_module(_NAMES[name]), name)
    elif name in _CONFIGS:
        value = import_module("graft.methods").config_of(_CONFIGS[name])
    elif name in _TUNERS:
        value = import_module("graft.model.tuner").tuner_of(_TUNERS[name])
    else:
        raise AttributeError(f"module 'graft' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, sorted."""
    return sorted(__all__)


if os.environ.get("GRAFT_AS_PEFT", "") not in ("", "0"):  # see graft.compat.peft
    import_module("graft.compat.peft").install(children=True)
