"""What LoRAs and their relatives change in a layer, and how rows of one pass get each their own."""
