# SPDX-License-Identifier: Apache-2.0
"""The names in each module of PEFT 0.21.2, as data. Those of methods follow from the table of methods."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import graft
from graft.methods import IN_PEFT, METHODS

# PEFT's names that are not public in graft, by the module that holds them: "theirs=ours" or the one name. Without those
# of `clients`, `layers` and `shims`, which are for PEFT's callers only
HELD: dict[str, str] = {
    "graft.kernels.structured": "factorization",
    "graft.core.containers": "BufferDict",
    "graft.core.merging": "check_adapters_to_merge=select_unmerged",
    "graft.methods.road": "RoadVariant",
    "graft.methods.shadow.detached": "DetachedShadowModel ShadowCache",
    "graft.methods.shira": "random_mask",
    "graft.methods.xlora": "XLoraClassifier",
    "graft.prompts.base": "BasePromptEncoder=Prompt",
    "graft.config.base": "CONFIG_NAME PeftConfigMixin=PeftConfig",
    "graft.config.fields": "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING=IA3_FEEDFORWARD",
    "graft.io.files": "SAFETENSORS_WEIGHTS_NAME WEIGHTS_NAME",
    "graft.serving.hotswap": "check_hotswap_configs_compatible=check_compatible",
    "graft.combine.rules": "dare_linear dare_ties magnitude_based_pruning=keep_largest magnitude_prune "
    "task_arithmetic=linear ties",
    "graft.inject.match": "_find_minimal_target_modules=minimize_names "
    "MIN_TARGET_MODULES_FOR_OPTIMIZATION=COMPRESS_FROM check_target_module_exists=is_targeted",
    "graft.inject.targets": "DUMMY_TARGET_MODULES=DUMMY INCLUDE_LINEAR_LAYERS_SHORTHAND=ALL_LINEAR",
    "graft.inject.beside": "TrainableTokensWrapper",
    "graft.model.tasks": "_BaseAutoPeftModel=AutoPeftModel",
    "graft.model.functional": "cast_adapter_dtype check_if_peft_model delete_adapter disable_input_dtype_casting "
    "inspect_matched_modules rescale_adapter_scale set_adapter set_requires_grad update_forward_signature "
    "update_generate_signature update_signature",
    "graft.model.status": "TunerLayerStatus TunerModelStatus",
    "graft.model.mixed": "MixedModel PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "graft.model.tuner": "BaseTuner=Tuner",
    "graft.train.calibration": "CordaEigens",
    "graft.methods.lora.loftq": "loftq_init",
    "graft.train.eva": "forward_fn_dict prepare_layer_inputs_fn_language_modeling "
    "prepare_model_inputs_fn_language_modeling",
    "graft.train.helpers": "fsdp_auto_wrap_policy infer_device _get_no_split_modules=find_no_split_classes",
    "graft.train.callbacks": "AdamssAsaCallback MontecloraTrainerMixin",
    "graft.optim": "LoraFAOptimizer create_lorafa_optimizer create_loraplus_optimizer create_riemannian_optimizer",
}
WHERE: dict[str, tuple[str, str]] = {
    (pair := item.partition("="))[0]: (module, pair[2] or pair[0])
    for module, items in HELD.items()
    for item in items.split()
}


def import_held(name: str) -> Any:
    """Return the object inside graft of a name in `HELD`; its module is imported on the first call."""
    module, attribute = WHERE[name]
    return getattr(import_module(module), attribute)


_TASKS = " ".join(name for name in graft.__all__ if name.startswith("PeftModel"))
_AUTO = " ".join(name for name in graft.__all__ if name.startswith("AutoPeftModel"))
_PREFIXES = "PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING"
_MAPPINGS = f"{_PREFIXES} PEFT_TYPE_TO_TUNER_MAPPING"
_WEIGHTS = "SAFETENSORS_WEIGHTS_NAME WEIGHTS_NAME"
_FILES = f"CONFIG_NAME {_WEIGHTS}"
_STATE = (
    "get_base_model_state_dict get_peft_model_state_dict load_peft_weights set_base_model_state_dict "
    "set_peft_model_state_dict"
)
_DISCOVERY = "EMBEDDING_LAYER_NAMES INCLUDE_LINEAR_LAYERS_SHORTHAND"
_WRAPPERS = "AuxiliaryTrainingWrapper ModulesToSaveWrapper TrainableTokensWrapper"
_TRAINING = "cast_mixed_precision_params infer_device prepare_model_for_kbit_training shift_tokens_right"
_EVA = "get_eva_state_dict initialize_lora_eva_weights"
_SUBMODULES = "_get_submodules get_pattern_key transpose"


def mapping_name(config: str) -> str:
    """Return PEFT's name of a method's table of default targets:
    TRANSFORMERS_MODELS_TO_<METHOD>_TARGET_MODULES_MAPPING.

    The method is the config's class name in upper case without "Config".
    """
    return f"TRANSFORMERS_MODELS_TO_{config.removesuffix('Config').upper()}_TARGET_MODULES_MAPPING"


# methods that have no default targets by architecture
WITHOUT_TARGETS = ["TRAINABLE_TOKENS", "ADAPTION_PROMPT", "XLORA", "SHADOW"]
MAPPINGS: dict[str, str] = {  # → peft_type
    mapping_name(row.config): name for name, row in METHODS.items() if row.in_peft and name not in WITHOUT_TARGETS
}
_TARGETS = f"TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING {' '.join(MAPPINGS)}"
_EXPORTED = " ".join(n for n in _TARGETS.split() if MAPPINGS.get(n) not in ("HIRA", "OSF"))  # which PEFT forgot

# module below `peft` → names in it; "peft" itself also holds all public names of graft
MODULES: dict[str, str] = {
    "": "PEFT_TYPE_TO_MIXED_MODEL_MAPPING PeftMixedModel",
    "auto": f"{_AUTO} {_TASKS} MODEL_TYPE_TO_PEFT_MODEL_MAPPING PeftConfig TOKENIZER_CONFIG_NAME _BaseAutoPeftModel",
    "config": "CONFIG_NAME PeftConfig PeftConfigMixin PeftType PromptLearningConfig TaskType",
    "functional": "cast_adapter_dtype delete_adapter get_peft_model_state_dict inject_adapter_in_model set_adapter "
    "set_peft_model_state_dict set_requires_grad",
    "helpers": "DoraCaching KappaTuneSelector MontecloraTrainerMixin PeftConfig PeftModel check_if_peft_model "
    "disable_input_dtype_casting find_kappa_target_modules rescale_adapter_scale update_forward_signature "
    "update_generate_signature update_signature",
    "import_utils": "",  # see shims.import_check
    "mapping": f"{_MAPPINGS} PEFT_TYPE_TO_MIXED_MODEL_MAPPING get_peft_config inject_adapter_in_model",
    "mapping_func": f"{_PREFIXES} MODEL_TYPE_TO_PEFT_MODEL_MAPPING PeftConfig PeftMixedModel PeftModel get_peft_model",
    "mixed_model": "PeftConfig PeftMixedModel",
    "optimizers": "create_lorafa_optimizer create_loraplus_optimizer create_riemannian_optimizer",
    "optimizers.lorafa": "LoraFAOptimizer create_lorafa_optimizer",
    "optimizers.loraplus": "create_loraplus_optimizer",
    "optimizers.riemannian": "create_riemannian_optimizer",
    "peft_model": f"{_TASKS} {_MAPPINGS} {_WEIGHTS} PeftConfig PeftType TaskType BaseTuner "
    "BaseTunerLayer AuxiliaryTrainingWrapper TrainableTokensWrapper TunerLayerStatus TunerModelStatus "
    "DUMMY_MODEL_CONFIG get_layer_status get_model_status get_peft_model_state_dict id_tensor_storage infer_device "
    "init_empty_weights load_peft_weights set_peft_model_state_dict shift_tokens_right",
    "tuners.mixed": "MixedModel",
    "tuners.mixed.model": "MixedModel",
    "tuners": "ArrowConfig BdLoraConfig EvaConfig KasaConfig LoftQConfig LoraGAConfig LoraRuntimeConfig "
    "MontecloraConfig VeloraConfig create_arrow_model MultitaskPromptTuningInit PromptEncoderReparameterizationType "
    f"{_EVA} preprocess_loraga "
    "PromptTuningInit " + " ".join(f"{row.config} {row.tuner}" for row in IN_PEFT.values()),
    "tuners._buffer_dict": "BufferDict",
    "tuners.adamss.asa_callback": "AdamssAsaCallback",
    "tuners.adaption_prompt.config": "TRANSFORMERS_MODEL_CONFIG",
    "tuners.shadow": "DetachedShadowModel ShadowCache",
    "tuners.adaption_prompt.utils": "llama_apply_rotary_pos_emb llama_rotate_half",
    "tuners.adalora": "RankAllocator",
    "tuners.adalora.layer": "RankAllocator",
    "tuners.cartridge.utils": "compose_cartridge_adapters initialize_kv_prefix_from_past_key_values "
    "initialize_kv_prefix_from_text prompt_embeddings_from_past_key_values",
    "tuners.lokr.layer": "factorization",
    "tuners.lora.arrow": "create_arrow_model",
    "tuners.lora.dora": "DoraLinearLayer dequantize_module_weight transpose",
    "tuners.lora.layer": "ALLOWED_COMPUTE_DTYPES VARIANT_KWARG_KEYS check_adapters_to_merge transpose",
    "tuners.lora.variants": "MiCALinearVariant calculate_alora_offsets",
    # in addition to those that follow from the table of methods
    "tuners.lora": f"{_EVA} convert_to_lora create_arrow_model preprocess_loraga save_as_lora",
    "tuners.lora.corda": "CordaEigens LoraConfig preprocess_corda",
    "tuners.lora.eva": f"{_EVA} LoraConfig forward_fn_dict prepare_layer_inputs_fn_language_modeling "
    "prepare_model_inputs_fn_language_modeling",
    "tuners.lora.conversion": "LoraConfig convert_to_lora save_as_lora",
    "tuners.lora.intruders": "reduce_intruder_dimension",
    "tuners.lora.loraga": "LoraConfig preprocess_loraga",
    "tuners.shira.mask_functions": "random_mask",
    "tuners.tuners_utils": "AuxiliaryTrainingWrapper BasePromptEncoder BaseTuner BaseTunerLayer BufferDict PeftConfig "
    "NoMatchingPeftModuleError PeftType PeftWarning TaskType check_adapters_to_merge init_empty_weights "
    "match_target_against_key "
    "DUMMY_MODEL_CONFIG DUMMY_TARGET_MODULES MIN_TARGET_MODULES_FOR_OPTIMIZATION SEQ_CLS_HEAD_NAMES UPCAST_DTYPES "
    f"{_DISCOVERY} PEFT_TYPE_TO_PREFIX_MAPPING _find_minimal_target_modules _get_submodules "
    "_ExcludedModule onload_layer _maybe_include_all_linear_layers cast_adapter_dtype check_target_module_exists "
    "delete_adapter inspect_matched_modules set_adapter set_requires_grad",
    "tuners.xlora.classifier": "XLoraClassifier",
    "utils": f"{_FILES} {_STATE} {_TRAINING} {_EXPORTED} {_WRAPPERS} ALLOWED_COMPUTE_DTYPES "
    "INCLUDE_LINEAR_LAYERS_SHORTHAND NoMatchingPeftModuleError PeftError PeftType PeftWarning TaskType UPCAST_DTYPES "
    "_get_submodules get_quantization_config register_peft_method replace_lora_weights_loftq transpose",
    "utils.constants": f"{_FILES} {_DISCOVERY} {_TARGETS} ALLOWED_COMPUTE_DTYPES DUMMY_MODEL_CONFIG "
    "DUMMY_TARGET_MODULES MIN_TARGET_MODULES_FOR_OPTIMIZATION SEQ_CLS_HEAD_NAMES TOKENIZER_CONFIG_NAME UPCAST_DTYPES",
    "utils.error": "NoMatchingPeftModuleError PeftError",
    "utils.hotswap": "check_hotswap_configs_compatible hotswap_adapter hotswap_adapter_from_state_dict "
    "prepare_model_for_compiled_hotswap",
    "utils.integrations": "dequantize_module_weight gather_params_ctx get_bnb_param_type init_empty_weights",
    "utils.loftq_utils": "loftq_init replace_lora_weights_loftq",
    "utils.merge_utils": "dare_linear dare_ties magnitude_based_pruning magnitude_prune task_arithmetic ties",
    "utils.other": f"{_FILES} {_DISCOVERY} {_EXPORTED} {_TRAINING} {_WRAPPERS} {_SUBMODULES} "
    "_get_input_embeddings_name _get_module_names_tied_with_embedding _get_no_split_modules _set_adapter "
    "fsdp_auto_wrap_policy get_quantization_config id_tensor_storage match_target_against_key",
    "utils.peft_types": "PeftType TaskType register_peft_method",
    "utils.save_and_load": f"{_STATE} {_WEIGHTS} {_DISCOVERY} PEFT_TYPE_TO_TUNER_MAPPING PeftType",
    "utils.transformers_weight_conversion": "build_peft_weight_mapping convert_peft_config_for_transformers "
    "get_model_conversion_mapping",
    "utils.warning": "PeftWarning",
}


# classes that a method has in addition to its config
BESIDE: dict[str, str] = {
    "LORA": "ArrowConfig BdLoraConfig CordaConfig EvaConfig KasaConfig LoftQConfig LoraGAConfig LoraRuntimeConfig "
    "MontecloraConfig VeloraConfig",
    "ROAD": "RoadVariant",
    "PROMPT_TUNING": "PromptTuningInit",
    "P_TUNING": "PromptEncoderReparameterizationType",
    "MULTITASK_PROMPT_TUNING": "MultitaskPromptTuningInit",
}


def folder(peft_type: str) -> str:
    """Return the folder of a method of PEFT below peft.tuners: the last part of graft's module of the method."""
    return IN_PEFT[peft_type].method.partition(":")[0].rpartition(".")[2]


WITH_BNB = ("LORA", "ADALORA", "IA3", "RANDLORA", "ROAD", "HIRA", "PVERA")  # methods with a module of these
LAYER_FILES = {"SHADOW": "layers"}  # where it is not `layer`
# PEFT's classes of LoRA on other packed weights → the store
OF_STORES = {f"{name}LoraLinear": name.lower() for name in ["GPTQ", "Awq", "Aqlm", "Eetq", "Hqq", "Inc", "Torchao"]}
OF_FILES = {**OF_STORES, "LoraParallelLinear": "tp_layer", "TeLinear": "te"}  # all that have a module to themselves
DISPATCH = {  # module below peft.tuners.lora → ends of the `dispatch_…` functions in it
    "layer": "default",
    "bnb": "bnb_4bit bnb_8bit",
    "te": "transformer_engine",
    "tp_layer": "megatron",
    **{store: store for store in OF_STORES.values()},
}
DISPATCH["model"] = " ".join(DISPATCH.values())
for file, kinds in DISPATCH.items():
    path = f"tuners.lora.{file}"
    MODULES[path] = f"{MODULES.get(path, '')} {' '.join(f'dispatch_{kind}' for kind in kinds.split())}".strip()
