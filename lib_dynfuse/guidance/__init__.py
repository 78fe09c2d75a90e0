"""Nudges towards reference pictures while denoising, and how near a picture came to them. Needs torch alone to import;
open_clip and transformers are imported when their encoders are loaded.
"""
