"""What a model, its outputs and its movement say of its health: numbers from arrays, and alarms from numbers."""
