//! Images: checks, pulls, listing.
