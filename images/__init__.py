"""What stands behind data.py: files of images, and what is done to batches of them.

image_folder.py  the images of a folder, every file accounted for
stream.py        processes that decode ahead of the step, for images that do not fit in memory
augment.py       random resized crops, colour jitter and smaller images, of a batch at once
"""
