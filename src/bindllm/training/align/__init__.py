"""Aligning a modality with the joint space of an encoder: pairs, contrastive training, retrieval metrics, folder."""
