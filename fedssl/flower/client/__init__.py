"""What a client does in its turn besides training: reads the instruction, readies its model, pays."""
