"""Files of DATA_DIR: damaged ones are set aside, and the free space of a disk is known."""
