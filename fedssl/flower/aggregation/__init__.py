"""Between an aggregation and Flower's messages."""
