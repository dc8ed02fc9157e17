"""What was learnt: probes of encoders, the monitor of every part of every model, training without a federation."""

from fedssl.evaluation.evaluator import Evaluator, Seen, encode

__all__ = ["Evaluator", "Seen", "encode"]
