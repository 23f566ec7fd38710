"""Where the bytes of images lie: folders, archives, lists, Hugging Face data sets."""
