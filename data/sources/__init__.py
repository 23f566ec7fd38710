"""Where the bytes of images are read from: folders, archives, lists, Hugging Face data sets."""
