"""What a client does in its turn besides training: reads the instruction, doubts it, readies its model, pays."""
