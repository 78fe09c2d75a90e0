"""The small trained model in the box, its LoRAs, and how they are made."""
