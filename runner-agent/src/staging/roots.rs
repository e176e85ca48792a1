//! Certificates of authorities that TLS may trust where a machine brings none.

use reqwest::Certificate;

/// The public authorities, as Mozilla's program lists them, and those of this PEM.
///
/// # Errors
/// Where the PEM holds something else.
pub(crate) fn roots(more: Option<&str>) -> reqwest::Result<Vec<Certificate>> {
    let known = webpki_root_certs::TLS_SERVER_ROOT_CERTS.iter();
    let mut all = known.map(|der| Certificate::from_der(der)).collect::<reqwest::Result<Vec<_>>>()?;
    if let Some(pem) = more {
        all.extend(Certificate::from_pem_bundle(pem.as_bytes())?);
    }
    Ok(all)
}
