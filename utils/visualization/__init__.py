"""Pictures of images, batches and attention, and curves for the terminal."""
