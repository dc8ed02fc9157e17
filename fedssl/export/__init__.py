"""The pretrained encoder as files for others: weights, ONNX, a model card."""

from fedssl.export.encoder import PretrainedEncoder, describe, load_encoder, save_encoder

__all__ = ["PretrainedEncoder", "describe", "load_encoder", "save_encoder"]
