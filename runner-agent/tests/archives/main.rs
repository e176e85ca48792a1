//! Archives: what is unpacked, and each way in which one can be hostile. Every archive is built here, byte by byte where no
//! packer would write it.

mod fuzz;
mod kit;
mod staged;
mod tars;
mod zips;
