"""Models beside SDXL's UNet: transformers with grouped convolutions, and UNets whose blocks are of another kind."""

import copy

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel, UNetMotionModel, UNetSpatioTemporalConditionModel
from pipelines import FakePipeline, FakeTransformerPipeline, micro_transformer, micro_unet, prompts
from torch import nn

from mixdq_ao import MixDQConfig, MixDQTensor, QuantParams, calibrate, families, load, quantize_, save
from mixdq_ao.auto import Settings, auto
from mixdq_ao.errors import MixDQError, UnsupportedError
from mixdq_ao.evaluate import evaluate, sqnr
from mixdq_ao.fingerprints import arguments_digest
from mixdq_ao.sensitivity import sensitivity
from mixdq_ao.simulate import simulated

GROUPED = ["transformer_blocks.0.ff.conv_depth", "transformer_blocks.1.ff.conv_depth"]


@pytest.fixture(scope="module")
def params():
    return calibrate(FakeTransformerPipeline(), prompts(4), progress=False)


def flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        axes_dims_rope=(4, 4, 8),
    ).eval()


def run_flux(model) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(2, 16, 16, generator=g),
            timestep=torch.ones(2),
            encoder_hidden_states=torch.randn(2, 7, 32, generator=g),
            pooled_projections=torch.randn(2, 24, generator=g),
            img_ids=torch.arange(48.0).reshape(16, 3) % 4,
            txt_ids=torch.zeros(7, 3),
            return_dict=False,
        )[0]


# --- transformers -----------------------------------------------------------------------------------------------------


def test_a_transformer_is_calibrated_without_its_grouped_convolutions(params, tmp_path):
    assert repr(params) == "QuantParams(29 layers, BOS apart, 2 protected, from calibration)"
    assert params.protect == families.grouped_convolutions(micro_transformer()) == GROUPED
    bos = {name for name, p in params.layers.items() if p.bos_output is not None}
    assert bos == {
        *(f"caption_projection.linear_{i}" for i in (1, 2)),
        *(f"transformer_blocks.{i}.attn2.to_{which}" for i in (0, 1) for which in "kv"),
    }
    params.save(tmp_path / "params.safetensors")
    model = micro_transformer()
    quantize_(model, MixDQConfig(QuantParams.load(tmp_path / "params.safetensors")))
    floating = [n for n, m in families.layers_of(model).items() if not isinstance(m.weight, MixDQTensor)]
    assert floating == GROUPED
    # A plan of the layers that can be quantized is enough.
    plan = {name: 4 for name in families.layers_of(model) if name not in GROUPED}
    quantize_(micro_transformer(), MixDQConfig(params, plan, plan | dict.fromkeys(GROUPED, 8)))


def test_grouped_convolutions_are_all_listed_at_once():
    with pytest.raises(UnsupportedError) as error:
        quantize_(micro_transformer(), MixDQConfig())
    assert all(name in str(error.value) for name in (*GROUPED, "groups=160", "protect="))


def test_a_transformer_is_simulated_without_its_grouped_convolutions(params):
    pipe = FakeTransformerPipeline()
    with simulated(pipe.transformer, params, (4, 8)):
        layers = families.layers_of(pipe.transformer)
        assert [name for name, m in layers.items() if type(m.weight.data) is torch.Tensor] == GROUPED


@pytest.mark.parametrize("cheap", [True, False])
def test_sensitivity_of_a_transformer(params, tmp_path, cheap):
    pipe = FakeTransformerPipeline()
    found = sensitivity(pipe, params, prompts(2), tmp_path, kinds=("weight",), cheap=cheap, progress=False)
    assert set(found.scores["weight"]) == {"sqnr"}  # no content layers, which pictures would judge
    names = [name for name in families.layers_of(pipe.transformer) if name not in GROUPED]
    assert list(found.scores["weight"]["sqnr"]) == names
    assert all(by_bits[2] < by_bits[8] for by_bits in found.scores["weight"]["sqnr"].values())


def test_auto_of_a_transformer(tmp_path):
    pipe = FakeTransformerPipeline()
    settings = Settings(budget=5.0, seeds=(0,), batch_size=2, sensitivity_prompts=2, choose_prompts=2, candidates=2)
    done = auto(pipe, prompts(4), prompts(2), tmp_path, settings, progress=False)
    assert type(pipe.transformer).__name__ == "SanaTransformer2DModel" and not hasattr(pipe, "unet")
    assert not set(GROUPED) & set(done.plan)
    report = done.report.read_text()
    assert all(name in report for name in ("transformer_blocks.0.attn2", "SQNR of the UNet output at 4 bits"))
    model = load(done.model)
    assert {n: m.weight.bits for n, m in families.layers_of(model).items() if n not in GROUPED} == dict(done.plan)


def test_evaluation_leaves_a_transformer_as_it_was(params):
    pipe = FakeTransformerPipeline()
    before = pipe.transformer
    result = evaluate(pipe, {"W8A8": MixDQConfig(params), "W4A8": MixDQConfig(params, 4)}, prompts(2), progress=False)
    assert pipe.transformer is before
    assert result.row("W8A8").mean("sqnr") > max(25, result.row("W4A8").mean("sqnr"))


def test_flux_is_quantized_saved_and_compiled(tmp_path):
    model, floating = flux(), run_flux(flux())
    quantize_(model, MixDQConfig(weight_bits=8))
    assert sqnr(floating, out := run_flux(model)) > 30
    save(model, tmp_path / "flux.safetensors")
    assert torch.equal(run_flux(load(tmp_path / "flux.safetensors")), out)
    assert sqnr(out, run_flux(torch.compile(model, fullgraph=True, backend="eager"))) > 60


def test_layers_of_joint_attention_are_siblings_where_they_read_one_input():
    found = {tuple(name.rpartition(".")[2] for name in layers) for layers in families.siblings_of(flux())}
    assert found == {("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")}
    assert len(families.siblings_of(flux())) == 3  # two of the joint block, one of the single block


def test_a_pipeline_with_nothing_to_quantize():
    with pytest.raises(MixDQError, match=r"found FakePipeline. .* pipe.unet or pipe.transformer"):
        quantize_(FakePipeline(), MixDQConfig())
    with pytest.raises(UnsupportedError, match=r"object has no unet or transformer to quantize. .* observe\(\)"):
        calibrate(object(), prompts(1))


# --- UNets ------------------------------------------------------------------------------------------------------------


def test_a_class_of_ones_own_is_of_its_parents_family():
    class Mine(UNet2DConditionModel):
        pass

    assert families.family_of(Mine(**micro_unet().config)) is families.SDXL


def test_a_file_of_a_class_that_no_file_builds_is_evaluated(tmp_path):
    class Mine(UNet2DConditionModel):
        pass

    pipe, file = FakePipeline(), tmp_path / "mine.safetensors"
    pipe.unet.__class__ = Mine
    model = copy.deepcopy(pipe.unet)
    quantize_(model, MixDQConfig())
    save(model, file)
    with pytest.raises(MixDQError, match="give it as model="):
        load(file)
    result = evaluate(pipe, {"file": file, "here": MixDQConfig()}, prompts(1), progress=False)
    assert result.row("file").values == result.row("here").values


def test_video_unets():
    """AnimateDiff's is Stable Diffusion's with layers between; SVD's resnets are pairs, whose halves are not joined."""
    sizes = {"block_out_channels": (32, 32), "layers_per_block": 1, "cross_attention_dim": 8, "num_attention_heads": 2}
    motion = UNetMotionModel(
        **sizes,
        norm_num_groups=8,
        motion_num_attention_heads=2,
        use_motion_mid_block=False,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
    )
    assert families.family_of(motion) is families.SD and len(families.split_points(motion)) == 4
    svd = UNetSpatioTemporalConditionModel(
        **sizes,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    )
    assert families.split_points(svd) == {}
    quantize_(svd, MixDQConfig(), filter_fn=lambda module, name: name == "conv_in")


def test_up_blocks_that_do_not_read_one_skip_in_each_resnet_have_no_split_points():
    unet = copy.deepcopy(micro_unet())
    unet.up_blocks[1].resnets = nn.ModuleList([*unet.up_blocks[1].resnets][:1])
    assert families.split_points(unet) == {}


def test_video_is_not_evaluated(params, tmp_path):
    class Video(FakePipeline):
        def __call__(self, **kwargs):
            return object()

    with pytest.raises(UnsupportedError, match="Video makes no pictures"):
        evaluate(Video(), {}, prompts(1), progress=False)
    with pytest.raises(UnsupportedError, match="Video makes no pictures"):
        sensitivity(Video(), None, prompts(1), tmp_path, progress=False)


def test_pictures_of_pipelines_that_know_arrays_only(params, tmp_path):
    """StableDiffusionAdapterPipeline gives arrays where tensors are asked for."""

    class Arrays(FakePipeline):
        def __call__(self, output_type, **kwargs):
            return super().__call__(output_type="np" if output_type == "pt" else output_type, **kwargs)

    def measured(pipe, folder):
        found = sensitivity(
            pipe, None, prompts(2), folder, kinds=("act",), metrics="both", layers=["conv_in"], progress=False
        )
        return found.scores["act"]["ssim"]["conv_in"]

    assert measured(Arrays(), tmp_path / "arrays") == measured(FakePipeline(), tmp_path / "tensors")


# --- arguments of a pipeline ------------------------------------------------------------------------------------------


def test_a_pipeline_that_needs_more_than_prompts(tmp_path):
    class Edits(FakePipeline):
        def __call__(self, image=None, **kwargs):
            if image is None:
                raise ValueError("`image` must be given")
            return super().__call__(**kwargs)

    assert len(calibrate(Edits(), prompts(1), progress=False, image="there").layers) == 85
    for run in (
        lambda: calibrate(Edits(), prompts(1), progress=False),
        lambda: sensitivity(Edits(), None, prompts(1), tmp_path, progress=False),
        lambda: evaluate(Edits(), {}, prompts(1), progress=False),
    ):
        with pytest.raises(MixDQError, match=r"^Edits does not take this call \(`image` must be given\)"):
            run()


def test_arguments_are_told_apart_by_value():
    from PIL import Image

    class Callback:
        pass

    def digests(*values):
        return [arguments_digest({"image": value}) for value in values]

    picture = Image.new("RGB", (8, 8), "red")
    other = Image.new("RGB", (8, 8), "blue")
    same = digests(picture, picture.copy()), digests(Callback(), Callback()), digests([picture], [picture.copy()])
    assert all(a == b for a, b in same)
    large = torch.zeros(2000), torch.zeros(2000)
    large[1][1000] = 1  # which the text of a tensor leaves out
    different = digests(picture, other, *large, large[0].bfloat16()[:5], {"a": picture}, {"a": other}, 1, "1", None)
    assert len(set(different)) == len(different)
