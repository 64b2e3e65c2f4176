"""Teaching a modality to the joint space of an encoder: pairs, contrastive loss, measurement, and the folder."""
