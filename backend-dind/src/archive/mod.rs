//! Tars, as the engine takes and gives them: made and read as streams, with bounded memory.

mod pack;
mod unpack;

pub(crate) use self::{
    pack::{Owner, Part, pack, pack_small},
    unpack::{StreamReader, read_file},
};
