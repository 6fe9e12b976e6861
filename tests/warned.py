# SPDX-License-Identifier: Apache-2.0
"""Warnings that tests call forth without being about them: what each says, why it comes, and where.

Every other warning fails its test (pyproject). A test that is about a warning records it with `pytest.warns`; plain use
has none (model/test_quiet.py).
"""

from __future__ import annotations

from typing import NamedTuple


class Warned(NamedTuple):
    """A warning that does not fail a test."""

    says: str  # a regular expression: the beginning of its text
    why: str
    where: str  # beginnings of test ids below tests/


# folders in which every sample of tests/samples meets every layer
MATRICES = "combine/ compat/ conformance/ kernels/ optim/ packages/ parity/ prompts/ serving/ storage/ "

WARNED = [
    Warned(
        "fan_in_fan_out is set to",
        "GPT-2's layers store (in, out), and configs say the contrary by default",
        MATRICES + "core/test_layer.py inject/test_tied.py io/test_entries.py methods/test_arrow.py "
        "methods/test_corda.py methods/test_dora_caching.py methods/test_loftq.py methods/test_loraga.py model/tasks/ "
        "model/test_registry.py::test_all_linear_leaves_a_head_out_that_lost_its_adapters train/test_kappa.py",
    ),
    Warned("Invalid `(oft_block_size|r)`", "samples of OFT ask for blocks that do not divide the layers",
           MATRICES + "core/test_sparing.py io/test_entries.py model/test_bad_input.py trust/test_audit.py"),
    Warned(
        "LoRA adapter added to Conv",
        "a convolution with groups cannot be merged",
        MATRICES + "core/test_layer.py::test_a_failed_merge_and_unload_leaves_the_model "
        "model/test_bad_input.py::test_merge_that_cannot_be",
    ),
    Warned(r"`\w+_config` specified but will be ignored", "a start from data is replaced by its values",
           MATRICES + "methods/test_corda.py methods/test_lora_shift.py trust/test_audit.py"),
    Warned("Merging has lost a part", "random updates of the size of a rounding step", "packages/ distributed/"),
    Warned("Some layers of the model are plain", "some are adapted, and their configs name no plain ones", "packages/"),
    Warned("Layer '.*'.* has no bias", "BEFT meets layers without one", MATRICES + "model/tasks/"),
    Warned(
        "`lora_bias=True` was passed", "so does LoRA with a bias of its own", MATRICES + "methods/test_lora_extras.py"
    ),
    Warned("Specified to not save", "samples leave out of files what a seed gives again",
           MATRICES + "core/test_shared.py methods/test_supertuning.py::test_files_without_places"),
    Warned(
        "Setting `save_embedding_layers` to",
        "adapters of embeddings are saved with the embedding",
        MATRICES + "files/test_verify.py io/test_checkpoint_files.py methods/test_lora_extras.py methods/test_xlora.py",
    ),
    Warned(r"r=\d+ is odd", "a sample of HRA has an odd number of reflections", MATRICES),
    Warned(
        r"\w+ entry '.*' matched nothing",
        "targets name layers of several models",
        MATRICES + "model/tasks/ inject/test_parameters.py::test_old_checkpoints_load_into_stacks "
        "model/test_scaling.py::test_injection_is_linear_however_targets_are_named",
    ),
    Warned(r"The following \w+_pattern keys did not match", "patterns name layers that are no targets",
           MATRICES + "inject/test_match.py::test_rank_patterns methods/test_corda.py"),
    Warned(
        "Adapter '.*' trains without its",
        "laws compare gradients of eval mode, in which nothing is dropped, with samples of dropout among the configs",
        MATRICES + "core/test_sparing.py methods/test_shadow.py",
    ),
    Warned("Found missing adapter keys", "files lack keys, to be reported", "compat/test_reports.py"),
    Warned("Nearly all gates of", "FineGates that begin as the identity",
           MATRICES + "core/ device/ inject/ io/test_entries.py model/ trust/"),
    Warned("With use_khatri_rao", "LoHa's other start",
           MATRICES + "core/ device/ inject/ io/test_entries.py model/ trust/"),
    Warned("The invocation tokens of aLoRA", "random tokens may be without them", MATRICES),
    Warned(
        "Adapter name '.*' should not be contained in the prefix",
        "'a' is a short name for an adapter",
        "combine/ compat/ core/ methods/test_c3a.py model/test_life_cycle.py model/test_mixed.py "
        "model/test_registry.py packages/ storage/ trust/test_said.py",
    ),
    Warned(
        "Already following adapters were merged",
        "one is merged after the other",
        "conformance/test_pairs.py core/test_layer.py core/test_merging.py inject/test_tied.py "
        "methods/test_beft.py::test_merged_between_others "
        "methods/test_glora.py::test_adapters_act_on_the_weight_as_it_was "
        "model/test_mixed.py::test_three_methods_and_two_adapters_of_one packages/ "
        "storage/test_bnb.py storage/test_dequantize.py::test_a_failure_leaves_the_packed_weights",
    ),
    Warned(
        "All adapters are already merged",
        "so is the same one again",
        "inject/test_parameters.py::test_layers_below_a_module_whose_parameters_are_targets "
        "methods/test_osf.py::test_merging_twice_is_merging_once "
        "packages/test_bitsandbytes.py::test_a_rearranged_weight_is_put_back",
    ),
    Warned(
        "Adapter cannot be set when the model is merged",
        "another becomes active while one is merged",
        "combine/test_intruders.py::test_a_merged_adapter_and_a_file "
        "conformance/test_matrix.py::test_half_precision_comes_back_bit_for_bit "
        "parity/test_adapters.py::test_while_merged",
    ),
    Warned(
        "Active adapters .* are not merged",
        "of several adapters one is merged",
        "core/test_layer.py core/test_merging.py "
        "io/test_checkpoint_files.py::test_a_merged_adapter_does_not_make_it_another_base "
        "methods/test_beft.py::test_merged_between_others "
        "methods/test_glora.py::test_adapters_act_on_the_weight_as_it_was "
        "model/test_mixed.py::test_three_methods_and_two_adapters_of_one "
        "packages/ parity/test_adapters.py::test_while_merged parity/test_merge.py::test_merge_one_of_two",
    ),
    Warned(
        "Adapter .* was active which is now deleted",
        "the active adapter is deleted",
        "compat/test_callers.py inject/test_saved_modules.py "
        "methods/test_vblora.py::test_it_trains_with_its_adapter "
        "model/test_mixed.py::test_methods_that_call_different_things_by_one_name "
        "model/test_nothing_silent.py::test_configs_of_a_model_without_a_wrapper_follow_deletion "
        "model/test_scaling.py::test_injection_is_linear "
        "parity/test_adapters.py parity/test_status.py prompts/test_adapters.py::test_scripts "
        "storage/test_dequantize.py::test_a_failure_leaves_the_packed_weights "
        "train/test_helpers.py",
    ),
    Warned("As LoRA of rank", "updates of any rank are compared in ranks that PEFT is asked for",
           "combine/test_convert.py"),
    Warned("Converting a PEFT adapter to LoRA that is already", "LoRA is the plainest method to convert",
           "combine/test_convert.py"),
    Warned("The initialisation of '.*' changed the base weights", "the converted adapter belongs to the changed base",
           "combine/test_convert.py::test_what_can_be_converted_acts_as_before"),
    Warned(
        "AdaLoRA adapter .* took an optimizer step",
        "no rank is to move here",
        "conformance/test_matrix.py::test_a_copy_is_equal_and_independent "
        "kernels/test_other_kernels.py::test_functional_transforms serving/test_hotswap.py",
    ),
    Warned("The initialisation changes base weights that are on the meta",
           "an injection on the meta device has only names and shapes",
           "conformance/test_matrix.py::test_injection_on_the_meta_device_gives_the_same_names_and_shapes"),
    Warned(
        "Model has `tie_word_embeddings=True`",
        "a tied head is adapted without its embedding",
        "core/test_merging.py inject/test_tied.py "
        "model/test_registry.py::test_all_linear_leaves_a_head_out_that_lost_its_adapters",
    ),
    Warned(r"\w+ changes the base weights of the model", "PiSSA and OLoRA stand beside other adapters",
           "core/test_w0.py::test_an_initialisation_may_rewrite_the_base_under_a_merge packages/test_bitsandbytes.py"),
    Warned(
        "After the first backward pass",
        "base weights train and are not saved",
        "kernels/test_other_kernels.py::test_a_base_bias_that_trains_gets_its_gradient "
        "kernels/test_other_kernels.py::test_a_base_weight_that_trains_gets_its_gradient",
    ),
    Warned(
        r"\S*adapter_config.json was edited since its weights were saved",
        "the file beside the weights is edited",
        "io/test_checkpoint_files.py::test_a_config_that_does_not_fit "
        "io/test_checkpoint_files.py::test_config_keys_of_newer_versions_are_named_and_left_out "
        "model/test_bad_input.py prompts/test_bad_prompts.py serving/ trust/test_loading.py trust/test_saves.py",
    ),
    Warned(
        "Adapter '.*' gets the values of",
        "values of one adapter go into another",
        "methods/test_arrow.py::test_directions_follow_the_experts "
        "model/test_bad_input.py::test_load_over_an_adapter_of_another_shape prompts/test_bad_prompts.py",
    ),
    Warned(
        "Adapter '.*' from .* was trained on a base model of the same architecture",
        "a file meets another base",
        "methods/test_adamss.py::test_a_file_of_peft_for_other_clusters_is_refused "
        "methods/test_delora.py::test_norms_are_of_the_weight_without_adapters "
        "methods/test_mica.py::test_b_never_trains trust/test_audit.py",
    ),
    Warned(
        r"`init_lora_weights` is '\w+' but `\w+_config` is not specified",
        "a start with its default settings",
        "methods/test_corda.py::test_data_that_say_too_little "
        "methods/test_lora_shift.py::test_other_strings_work_or_raise",
    ),
    Warned("TRAINABLE_TOKENS has no modules_to_save", "the head of a task is not to train here", "model/tasks/"),
    Warned(
        "Found missing adapter keys",
        "a file holds a part of the adapter",
        "inject/test_parameters.py::test_old_checkpoints_load_into_stacks "
        "parity/test_differences.py::test_load_adapter_is_strict_and_undoes_itself",
    ),
    Warned(
        "While injecting the PEFT adapters, an inconsistency was discovered",
        "the state dict decides what is adapted, against the config",
        "inject/test_attention.py::test_a_model_without_a_wrapper_and_its_state_dict "
        "parity/test_functional.py::test_inject_from_a_state_dict",
    ),
    Warned("Some weights of adapter 'default' were not initialized", "a file of other sizes, as far as it fits",
           "parity/test_functional.py::test_mismatched_sizes_can_be_ignored"),
    Warned("You have passed exclude_modules", "one of the exclusions has nothing to exclude",
           "inject/test_parameters.py::test_exclusions_and_layers_apply_to_parameters"),
    Warned("(The density|combination_type='linear' has no use for density)",
           "every rule gets a density, and one that prunes nothing", "combine/test_parity.py"),
    Warned("Argument mask_type='largest' is not recognized", "the mask is given after the config is made",
           "methods/test_shira.py"),
    Warned("`enable_softmax_topk` enabled", "PEFT says it as well", "methods/test_xlora.py::test_configs"),
    Warned(
        "Adapter '.*' was loaded for inference",
        "it is loaded between steps of training",
        "model/test_life_cycle.py::test_switching_reaches_parameters_that_were_replaced packages/ "
        "storage/test_calibrated.py storage/test_hqq.py",
    ),
    Warned(r"`\w*alpha` is 0 on some or all layers", "a warning beside the one in question", "trust/test_said.py"),
    Warned("The adapter is saved; .* could not be written", "the disk refuses the model card", "trust/test_saves.py"),
    Warned("A save was cut short", "it was", "trust/test_saves.py trust/test_writers.py"),
    Warned(
        "for MLP, the argument `encoder_num_layers` is ignored", "PEFT says it as well", "prompts/test_bad_prompts.py"
    ),
    Warned("aLoRA is currently only supported for CAUSAL_LM",
           "it is refused afterwards; or acts in a bare layer, by offsets that the call gives",
           "serving/test_slots.py conformance/"),
    Warned("Unexpected keyword arguments", "a Cartridge's file is read as prefix tuning's",
           "prompts/test_kv_prefix.py::test_cartridges_that_cannot_be_composed"),
    # of packages below
    Warned("Prefix tuning injected into layers", "Gemma says which layers share keys and values",
           "model/generation/test_generate.py"),
    Warned("enable_nested_tensor is True", "torch says it of an odd number of heads",
           "inject/test_attention.py::test_an_encoder_layer_calls_it"),
    Warned("Full backward hook is firing", "PEFT's LoRA-GA has hooks on layers whose inputs have no gradients",
           "methods/test_loraga.py"),
    Warned("`gradient_checkpointing_enable` is deprecated", "PEFT calls transformers by the old name",
           "train/test_helpers.py"),
    Warned(
        "Detected pickle protocol",
        "a damaged torch file",
        "io/test_checkpoint_files.py::test_a_torch_file_that_holds_more_than_tensors_is_refused "
        "model/test_bad_input.py::test_files",
    ),
    Warned("torch.quantize_per_tensor", "a tensor of torch's old quantization in a file", "trust/test_loading.py"),
    Warned("TypedStorage is deprecated", "an old torch file", "trust/test_loading.py"),
    Warned("unclosed (file|scandir)", "an interrupt comes between opening and keeping", "trust/test_saves.py"),
    Warned("FSDP2-wrapped module", "the output of a tiny model is a view", "compat/test_callers.py"),
    Warned("None of the inputs have requires_grad",
           "reentrant checkpointing of transformers 4 begins below an embedding that does not train",
           "model/generation/test_checkpointing.py"),
]  # fmt: skip
