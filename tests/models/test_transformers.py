"""Whole models: Hugging Face's architectures with tiny configurations, as unlike each other as they come.

Text has a dynamic batch, a dynamic length and a mask with padding; the rest a dynamic batch, and sound a dynamic length
too. By default a few; `--all-models` takes every one.
"""

import pytest
import torch
from harness import zoo

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TEXT = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    vocab_size=99,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
DECODER = dict(TEXT, num_key_value_heads=2, use_cache=False)
GPT2 = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=64, use_cache=False)
BART = dict(
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    vocab_size=99,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=2,
    use_cache=False,
)
T5 = dict(d_model=32, num_layers=2, num_heads=4, d_ff=64, d_kv=8, vocab_size=99, use_cache=False)
EXPERTS = dict(DECODER, experts_implementation="batched_mm")  # the others select by value
VISION = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
)
WINDOWS = dict(image_size=32, patch_size=4, embed_dim=12, depths=[2, 2], num_heads=[2, 3], window_size=4)
PYRAMID = dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4])
AUDIO = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    conv_dim=(16, 16),
    conv_kernel=(10, 3),
    conv_stride=(5, 2),
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=2,
)
LENGTHS = {1: 5, 2: 8, 3: 11, 4: 9}  # by batch


def ids(batch, length):
    return torch.randint(3, 99, (batch, length))


def text(batch):
    length = LENGTHS[batch]
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1:, length - 2 :] = 0
    return [], {"input_ids": ids(batch, length), "attention_mask": mask}


def both_texts(batch):
    return [], {**text(batch)[1], "decoder_input_ids": ids(batch, LENGTHS[batch] - 1)}


def text_and_image(batch):
    mask = torch.ones(batch, 8, dtype=torch.long)
    return [], {"input_ids": ids(batch, 8), "pixel_values": torch.randn(batch, 3, 32, 32), "attention_mask": mask}


def lengths(count):
    return dict(min_shapes=[(1, 4)] * count, opt_shapes=[(2, 8)] * count, max_shapes=[(4, 16)] * count)


def sound(batch):
    return [torch.randn(batch, 700 + 53 * batch)], {}


SOUND = dict(min_shapes=[(1, 400)], opt_shapes=[(2, 800)], max_shapes=[(4, 1600)])


def row(name, example, shapes, config, quick=False, **options):
    """A model class by its name, and its configuration's class and settings."""

    def make():
        return getattr(transformers, name)(getattr(transformers, config)(**options))

    return zoo.Row(name, make, example, shapes, quick)


def codec():
    """The encoder and the decoder of an audio codec, without the code book between them."""
    config = transformers.EncodecConfig(
        num_filters=4, hidden_size=16, codebook_dim=16, upsampling_ratios=[4, 2], sampling_rate=2400
    )
    model = transformers.EncodecModel(config)
    return torch.nn.Sequential(model.encoder, model.decoder)


BATCH = dict(max_batch_size=4)
IMAGE = (zoo.images(3, 32, 32), BATCH)
LARGE_IMAGE = (zoo.images(3, 64, 64), BATCH)
ROWS = [
    # encoders of text
    row("AlbertModel", text, lengths(2), "AlbertConfig", embedding_size=16, **TEXT),
    row("BertModel", text, lengths(2), "BertConfig", **TEXT),
    row("BigBirdModel", text, lengths(2), "BigBirdConfig", attention_type="original_full", **TEXT),
    row(
        "DebertaV2Model",
        text,
        lengths(2),
        "DebertaV2Config",
        quick=True,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        position_biased_input=False,
        **TEXT,
    ),
    row("ElectraModel", text, lengths(2), "ElectraConfig", embedding_size=16, **TEXT),
    row("EsmModel", text, lengths(2), "EsmConfig", position_embedding_type="rotary", mask_token_id=5, **TEXT),
    row("IBertModel", text, lengths(2), "IBertConfig", **TEXT),
    row("LukeModel", text, lengths(2), "LukeConfig", entity_vocab_size=10, entity_emb_size=8, **TEXT),
    row("MPNetModel", text, lengths(2), "MPNetConfig", **TEXT),
    row("MobileBertModel", text, lengths(2), "MobileBertConfig", embedding_size=32, intra_bottleneck_size=16, **TEXT),
    row(
        "ModernBertModel", text, lengths(2), "ModernBertConfig", local_attention=4, global_attn_every_n_layers=2, **TEXT
    ),
    row("RoFormerModel", text, lengths(2), "RoFormerConfig", **TEXT),
    row(
        "SqueezeBertModel",
        text,
        lengths(2),
        "SqueezeBertConfig",
        embedding_size=32,
        q_groups=2,
        k_groups=2,
        v_groups=2,
        post_attention_groups=2,
        intermediate_groups=4,
        output_groups=2,
        **TEXT,
    ),
    row("TapasModel", text, lengths(2), "TapasConfig", **TEXT),
    row("T5EncoderModel", text, lengths(2), "T5Config", **T5),
    row(
        "XLNetModel",
        text,
        lengths(2),
        "XLNetConfig",
        d_model=32,
        n_layer=2,
        n_head=4,
        d_inner=64,
        vocab_size=99,
        use_mems_eval=False,
    ),
    # decoders
    row(
        "BloomModel",
        text,
        lengths(2),
        "BloomConfig",
        n_layer=2,
        n_head=4,
        hidden_size=32,
        vocab_size=99,
        use_cache=False,
    ),
    row("CohereModel", text, lengths(2), "CohereConfig", **DECODER),
    row("FalconModel", text, lengths(2), "FalconConfig", alibi=True, **DECODER),
    row("GPT2Model", text, lengths(2), "GPT2Config", **GPT2),
    row("GPTJModel", text, lengths(2), "GPTJConfig", rotary_dim=4, **GPT2),
    row(
        "GPTNeoModel",
        text,
        lengths(2),
        "GPTNeoConfig",
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        window_size=4,
        attention_types=[[["global", "local"], 1]],
        vocab_size=99,
        max_position_embeddings=64,
        use_cache=False,
    ),
    row("GPTNeoXModel", text, lengths(2), "GPTNeoXConfig", **DECODER),
    row("Gemma2Model", text, lengths(2), "Gemma2Config", head_dim=8, sliding_window=4, **DECODER),
    row("LlamaForCausalLM", text, lengths(2), "LlamaConfig", quick=True, **DECODER),
    row(
        "MambaModel",
        lambda batch: ([ids(batch, 8)], {}),
        BATCH,
        "MambaConfig",
        quick=True,
        state_size=4,
        hidden_size=32,
        num_hidden_layers=2,
        vocab_size=99,
        use_cache=False,
    ),
    row("MixtralModel", text, lengths(2), "MixtralConfig", num_local_experts=4, **EXPERTS),
    row("MptModel", text, lengths(2), "MptConfig", d_model=32, n_layers=2, n_heads=4, vocab_size=99, use_cache=False),
    row("OPTModel", text, lengths(2), "OPTConfig", ffn_dim=64, word_embed_proj_dim=32, **DECODER),
    row("PhiModel", text, lengths(2), "PhiConfig", **DECODER),
    row("Qwen3Model", text, lengths(2), "Qwen3Config", head_dim=8, **DECODER),
    row("StableLmModel", text, lengths(2), "StableLmConfig", **DECODER),
    # encoders with decoders
    row("BartModel", both_texts, lengths(3), "BartConfig", **BART),
    row("M2M100Model", both_texts, lengths(3), "M2M100Config", **BART),
    row("MarianModel", both_texts, lengths(3), "MarianConfig", **BART),
    row("PegasusModel", both_texts, lengths(3), "PegasusConfig", **BART),
    row("T5Model", both_texts, lengths(3), "T5Config", quick=True, **T5),
    row("UMT5Model", both_texts, lengths(3), "UMT5Config", **T5),
    # vision
    row("BeitModel", *IMAGE, "BeitConfig", use_relative_position_bias=True, **VISION),
    row("CLIPVisionModel", *IMAGE, "CLIPVisionConfig", **VISION),
    row("DINOv3ViTModel", *IMAGE, "DINOv3ViTConfig", **VISION),
    row(
        "FocalNetModel",
        *IMAGE,
        "FocalNetConfig",
        image_size=32,
        embed_dim=12,
        hidden_sizes=[12, 24],
        depths=[1, 1],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
    ),
    row(
        "LevitModel",
        *LARGE_IMAGE,
        "LevitConfig",
        image_size=64,
        hidden_sizes=[16, 24, 32],
        depths=[1, 1, 1],
        num_attention_heads=[2, 3, 4],
        key_dim=[8, 8, 8],
    ),
    row(
        "SamVisionModel",
        *LARGE_IMAGE,
        "SamVisionConfig",
        hidden_size=32,
        output_channels=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
        window_size=3,
        global_attn_indexes=[1],
        mlp_dim=64,
        num_pos_feats=8,
    ),
    row("SegformerModel", *LARGE_IMAGE, "SegformerConfig", quick=True, **PYRAMID),
    row("Swinv2Model", *IMAGE, "Swinv2Config", **WINDOWS),
    row("VideoMAEModel", zoo.images(4, 3, 32, 32), BATCH, "VideoMAEConfig", num_frames=4, tubelet_size=2, **VISION),
    row("YolosForObjectDetection", *IMAGE, "YolosConfig", num_detection_tokens=5, **{**VISION, "image_size": [32, 32]}),
    # sound
    row(
        "ASTModel",
        zoo.images(24, 16),
        BATCH,
        "ASTConfig",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        patch_size=8,
        frequency_stride=4,
        time_stride=4,
        max_length=24,
        num_mel_bins=16,
    ),
    zoo.Row("Encodec", codec, zoo.images(1, 160), BATCH, quick=True),
    row("HubertModel", sound, SOUND, "HubertConfig", **AUDIO),
    row("Wav2Vec2Model", sound, SOUND, "Wav2Vec2Config", quick=True, **AUDIO),
    row(
        "Wav2Vec2ConformerModel",
        sound,
        SOUND,
        "Wav2Vec2ConformerConfig",
        position_embeddings_type="relative",
        max_source_positions=200,
        conv_depthwise_kernel_size=5,
        **AUDIO,
    ),
    row("WavLMModel", sound, SOUND, "WavLMConfig", num_buckets=16, max_bucket_distance=32, **AUDIO),
    # text and image, series
    row(
        "CLIPModel",
        text_and_image,
        BATCH,
        "CLIPConfig",
        projection_dim=16,
        vision_config=dict(VISION),
        text_config=dict(TEXT),
    ),
    row(
        "PatchTSTForPrediction",
        zoo.images(24, 3),
        BATCH,
        "PatchTSTConfig",
        num_input_channels=3,
        context_length=24,
        patch_length=4,
        patch_stride=4,
        d_model=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        ffn_dim=32,
        prediction_length=6,
    ),
]


def pytest_generate_tests(metafunc):
    zoo.parametrize(metafunc, ROWS)


def test_architecture(row, device):
    zoo.check_row(row, device)
