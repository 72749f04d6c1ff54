//! What properties tell of a certificate: read once, when it is loaded or a session begins.

use portcullis_abi::Certificate;
use rustls::pki_types::CertificateDer;
use x509_cert::der::pem::LineEnding;
use x509_cert::der::{Decode, EncodePem};
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;

/// Reads a certificate that TLS has accepted. One that cannot be read has nothing to tell, which stops no connection.
pub(crate) fn read(der: &CertificateDer<'_>) -> Option<Certificate> {
    let certificate = x509_cert::Certificate::from_der(der).ok()?;
    let alternatives = certificate.tbs_certificate.get::<SubjectAltName>().ok().flatten();
    let mut dns_names = Vec::new();
    let mut uris = Vec::new();
    let names = alternatives.iter().flat_map(|(_, names)| &names.0);
    for name in names {
        match name {
            GeneralName::DnsName(name) => dns_names.push(name.to_string()),
            GeneralName::UniformResourceIdentifier(uri) => uris.push(uri.to_string()),
            _ => {}
        }
    }
    let digest = ring::digest::digest(&ring::digest::SHA256, der);
    Some(Certificate {
        subject: certificate.tbs_certificate.subject.to_string(),
        dns_names,
        uris,
        sha256: digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect(),
        pem: certificate.to_pem(LineEnding::LF).ok()?,
    })
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    use super::*;

    #[test]
    fn reads_names_in_the_order_and_form_that_envoy_shows() {
        let mut params = CertificateParams::new(vec!["client.example".into(), "other.example".into()]).unwrap();
        params.subject_alt_names.push(SanType::URI("spiffe://lab/client".try_into().unwrap()));
        params.distinguished_name.remove(DnType::CommonName);
        params.distinguished_name.push(DnType::OrganizationName, "Lab, Inc");
        params.distinguished_name.push(DnType::OrganizationalUnitName, "x");
        params.distinguished_name.push(DnType::CommonName, "client one");
        let made = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        let read = read(made.der()).unwrap();
        assert_eq!(read.subject, "CN=client one,OU=x,O=Lab\\, Inc");
        assert_eq!(read.dns_names, ["client.example", "other.example"]);
        assert_eq!(read.uris, ["spiffe://lab/client"]);
        assert_eq!(read.sha256.len(), 64);
        assert_eq!(read.pem, made.pem().replace("\r\n", "\n"));
    }

    #[test]
    fn what_is_no_certificate_tells_nothing() {
        assert_eq!(read(&CertificateDer::from_slice(b"junk")), None);
    }
}
